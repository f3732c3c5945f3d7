#!/usr/bin/env python3
"""Tests of torque: `python3 test_torque.py`, measurements: `python3 test_torque.py bench`.

Sections follow those of torque.py. rTorrent and InfluxDB are the real programs, started on
loopback in a temporary folder; where they are not installed those tests are skipped, and with
TORQUE_LIVE=1 fail instead. TORQUE_RTORRENTS names the rTorrent commands to test, one a line.
"""
import contextlib
import datetime
import doctest
import io
import json
import logging
import os
import queue
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
import urllib.parse
import urllib.request
import xmlrpc.client
from unittest import mock

import torque

HERE = os.path.dirname(os.path.abspath(__file__))
LIVE = bool(os.environ.get('TORQUE_LIVE'))
RTORRENTS = [shlex.split(line) for line in os.environ.get(
    'TORQUE_RTORRENTS', 'rtorrent').splitlines() if line.strip()]


# --- What the tests share ----------------------------------------------------------------------

def need(command):
    """Skip a live test where its program is not installed; fail where it has to be."""
    if not shutil.which(command):
        if LIVE:
            raise AssertionError(f'{command} is not installed, and TORQUE_LIVE is set')
        raise unittest.SkipTest(f'{command} is not installed')


def wait_for(what, seconds=20.0):
    """Return the first true value of a function, watching closely; fail after a while."""
    end = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f'not seen within {seconds} s')
        time.sleep(0.002)


def free_port():
    """Return a TCP port of loopback that nobody uses."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def bencode(value):
    """Return the bencoded bytes of a value."""
    if isinstance(value, int):
        return b'i%de' % value
    if isinstance(value, str):
        value = value.encode('utf-8', 'surrogateescape')
    if isinstance(value, bytes):
        return b'%d:%s' % (len(value), value)
    if isinstance(value, list):
        return b'l' + b''.join(map(bencode, value)) + b'e'
    return b'd' + b''.join(bencode(key) + bencode(item)
                           for key, item in sorted(value.items())) + b'e'


def metafile(name, size=1, **info):
    """Return a single-file metafile whose data is that many zero bytes, and its info-hash."""
    import hashlib
    piece = 16384
    pieces = b''.join(hashlib.sha1(bytes(min(piece, size - start))).digest()
                      for start in range(0, size, piece))
    info = {'name': name, 'length': size, 'piece length': piece, 'pieces': pieces, **info}
    return (bencode({'announce': 'http://127.0.0.1:1/announce', 'info': info}),
            hashlib.sha1(bencode(info)).hexdigest().upper())


class Folder(unittest.TestCase):
    """A test with a temporary folder of its own, its log kept in self.lines."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix='torque-')
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.lines = []
        root = logging.getLogger('torque')
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(
            f'{record.levelname} {record.name[7:]}: {record.getMessage()}')
        saved = root.handlers[:], root.level, root.propagate
        root.handlers[:], root.propagate = [handler], False
        root.setLevel(logging.DEBUG)

        def restore():
            root.handlers[:], root.propagate = saved[0], saved[2]
            root.setLevel(saved[1])
        self.addCleanup(restore)

    def write(self, name, text):
        """Write a file in the folder and return its path."""
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as stream:
            stream.write(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return path

    def logged(self, *words):
        """Return the log lines that hold all the words."""
        return [line for line in self.lines if all(word in line for word in words)]


class Program:
    """A process whose output is read all the time; ended by stop()."""

    def __init__(self, words, **kwargs):
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, **kwargs)
        self.lines = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        with self.process.stdout as stream:
            for line in stream:
                self.lines.append(line.decode('utf-8', 'replace').rstrip('\n'))

    def seen(self, *words):
        """Return the output lines that hold all the words."""
        return [line for line in list(self.lines) if all(word in line for word in words)]

    def stop(self, number=signal.SIGTERM, seconds=30):
        """End the process and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(5)
        return self.process.returncode


def start_torque(*words, **kwargs):
    """Start torque.py as a user does, and return the Program."""
    return Program([sys.executable, os.path.join(HERE, 'torque.py'), *words], **kwargs)


def run_torque(*words, **kwargs):
    """Run torque.py to its end; return exit status, standard output, standard error."""
    done = subprocess.run([sys.executable, os.path.join(HERE, 'torque.py'), *words],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class RTorrent(Program):
    """A real rTorrent in a folder; tcp: on a port of loopback instead of a Unix socket."""

    def __init__(self, folder, command=None, tcp=False, rc=''):
        command = command or RTORRENTS[0]
        need(command[0])
        self.folder = folder
        for name in ('session', 'data'):
            os.makedirs(os.path.join(folder, name), exist_ok=True)
        if tcp:
            self.port = free_port()
            self.url, spelling = f'scgi://127.0.0.1:{self.port}', \
                f'network.scgi.open_port = 127.0.0.1:{self.port}'
        else:
            self.url = os.path.join(folder, 'rpc.sock')
            spelling = f'network.scgi.open_local = {self.url}'
            if os.path.exists(self.url):
                os.remove(self.url)
        with open(os.path.join(folder, 'rtorrent.rc'), 'w', encoding='utf-8') as stream:
            stream.write(f'directory.default.set = {folder}/data\n'
                         f'session.path.set = {folder}/session\n{spelling}\n'
                         'network.port_range.set = 50000-59999\nnetwork.port_random.set = yes\n'
                         'dht.mode.set = disable\nprotocol.pex.set = no\n'
                         f'trackers.use_udp.set = no\nsystem.daemon.set = true\n{rc}\n')
        super().__init__([*command, '-n', '-o', f'import={folder}/rtorrent.rc'], cwd=folder)
        self.engine = torque.Engine(self.url, 10)
        wait_for(self.answers)

    def answers(self):
        if self.process.poll() is not None:
            raise AssertionError(f'rTorrent ended: {self.lines}')
        with contextlib.suppress(torque.RpcError):
            return torque.Proxy(self.engine.send, self.url).system.pid('')

    def load(self, content, info_hash, *commands, start=False):
        """Load a metafile by content and wait until the item is there."""
        proxy = self.engine.open()
        (proxy.load.raw_start if start else proxy.load.raw)('', content, *commands)

        def there():
            with contextlib.suppress(torque.HashNotFound):
                return proxy.d.hash(info_hash)
        return wait_for(there)


class Server:
    """A double for faults: every connection is given to `answer(connection)` in a thread."""

    def __init__(self, answer, path=None):
        self.sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        self.sock.bind(path or ('127.0.0.1', 0))
        self.sock.listen(100)
        self.port = None if path else self.sock.getsockname()[1]
        self.url = path or f'scgi://127.0.0.1:{self.port}'
        self.answer, self.connections = answer, []
        self.ended = threading.Event()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection = self.sock.accept()[0]
                self.connections.append(connection)
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError), connection:
            self.answer(connection)

    def stop(self):
        self.ended.set()
        self.sock.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def request(connection):
        """Read one SCGI request and return its body."""
        content = b''
        while b':' not in content:
            content += connection.recv(65536)
        size, _, rest = content.partition(b':')
        while len(rest) < int(size) + 1:
            rest += connection.recv(65536)
        length = int(rest.split(b'\0')[1])
        while len(rest) < int(size) + 1 + length:
            rest += connection.recv(65536)
        return rest[int(size) + 1:]


def scgi_answer(body, content_type='text/xml'):
    """Return an SCGI answer as rTorrent sends it."""
    body = body if isinstance(body, bytes) else body.encode()
    return (f'Status: 200 OK\r\nContent-Type: {content_type}\r\n'
            f'Content-Length: {len(body)}\r\n\r\n').encode() + body


# --- Scheduler ---------------------------------------------------------------------------------

class Clocks:
    """A wall clock and an elapsed clock that a test moves."""

    def __init__(self, wall=1700000000.0, elapsed=5000.0):
        self.now, self.up = wall, elapsed

    def pass_time(self, seconds):
        self.now += seconds
        self.up += seconds


class TickTest(Folder):
    """The pure part: due times with clocks passed in."""

    def setUp(self):
        super().setUp()
        self.clocks = Clocks(1700000000.0 - 1700000000 % 3600)       # on the hour
        self.scheduler = torque.Scheduler(lambda: self.clocks.now, lambda: self.clocks.up)

    def add(self, text, name='job', **kwargs):
        return self.scheduler.add(torque.Task(name, torque.parse_schedule(text), lambda: None,
                                              **kwargs))

    def tick(self, seconds=0.0):
        """Let time pass, and return the names of what starts; runs end at once."""
        self.clocks.pass_time(seconds)
        ready, self.sleep = self.scheduler.tick(self.clocks.now, self.clocks.up)
        for task in ready:
            task.running_since = None
        return [task.name for task in ready]

    def test_interval_starts_at_once(self):
        self.add('every 15s')
        self.assertEqual(self.tick(), ['job'])
        self.assertEqual([self.tick(14.9), self.tick(0.1), self.tick(1)], [[], ['job'], []])

    def test_interval_does_not_drift(self):
        task = self.add('every 10s')
        self.tick()
        for _ in range(100):
            self.assertEqual(self.tick(10.003), ['job'])
            self.clocks.pass_time(-0.003)
        self.assertEqual(task.due, 5000 + 101 * 10)

    def test_calendar_waits_for_its_date(self):
        self.add('minute=*/5')
        self.assertEqual([self.tick(), self.tick(299), self.tick(1)], [[], [], ['job']])

    def test_sleep_is_bounded(self):
        self.add('hour=*')
        self.tick(1)
        self.assertEqual(self.sleep, torque.MAX_SLEEP)
        self.tick(3590)
        self.assertAlmostEqual(self.sleep, 9)

    def test_suspend_makes_one_run(self):
        interval, calendar = self.add('every 15s', 'a'), self.add('second=*/15', 'b')
        self.tick(1)
        self.assertEqual(sorted(self.tick(8 * 3600)), ['a', 'b'])
        self.assertEqual(self.tick(0), [])
        self.assertGreater(interval.missed, 900)
        self.assertGreater(calendar.missed, 900)
        self.assertTrue(self.logged('INFO a:', 'held up', 'merged into one'))
        self.assertEqual(sorted(self.tick(15)), ['a', 'b'])

    def test_clock_forward_makes_one_run(self):
        interval, calendar = self.add('every 1h', 'a'), self.add('minute=0', 'b')
        self.tick(1)
        self.clocks.now += 86400                 # the wall clock alone
        self.assertEqual(self.tick(), ['b'])
        self.assertEqual((interval.missed, calendar.missed), (0, 23))
        self.assertEqual(sorted(self.tick(3599)), ['a', 'b'])

    def test_clock_back_keeps_future_on_time(self):
        self.add('every 1m', 'a')
        self.add('minute=*', 'b')
        self.assertEqual(self.tick(), ['a'])
        self.assertEqual(self.tick(60), ['b', 'a'])
        self.clocks.now -= 86400
        self.assertEqual(self.tick(), [])
        self.assertEqual(sorted(self.tick(60)), ['a', 'b'])
        self.assertTrue(self.logged('set back by 1d'))

    def test_small_step_back_repeats_nothing(self):
        self.add('minute=*', 'b')
        self.add('hour=* minute=0', 'c')
        self.assertEqual(sorted(self.tick(3600)), ['b', 'c'])
        self.clocks.now -= 2
        self.assertEqual(self.tick(), [])
        self.assertEqual(self.tick(2.5), [])
        self.assertEqual(self.tick(60), ['b'])

    def test_fixed_hour_is_not_repeated(self):
        local = time.localtime(self.clocks.now + 3600)
        self.add(f'hour={local.tm_hour} minute={local.tm_min}')
        self.assertEqual(self.tick(3600), ['job'])
        self.clocks.now -= 1800
        self.assertEqual(self.tick(1800), [])
        self.clocks.now -= 6 * 3600              # so far back that it is another day's work
        self.tick()
        self.assertEqual(self.tick(6 * 3600 + 1), ['job'])

    def test_overlap_is_merged(self):
        task = self.add('every 1s')
        self.scheduler.tick(self.clocks.now, self.clocks.up)      # starts, and goes on
        for _ in range(3):
            self.clocks.pass_time(1)
            self.assertEqual(self.scheduler.tick(self.clocks.now, self.clocks.up)[0], [])
        self.assertEqual(task.waiting, 3)
        self.scheduler.run_task(task)
        self.assertEqual((task.waiting, task.missed, task.runs), (0, 2, 1))
        self.assertTrue(self.logged('3 runs came due during the last one', 'merged into one'))
        self.assertIsNotNone(task.running_since)                 # the merged run is on its way

    def test_jitter_stays_in_range(self):
        task = self.add('minute=* jitter=20s')
        delays = set()
        for _ in range(50):
            start = task.due
            while not self.tick(1):
                pass
            delays.add(self.clocks.now - start)
        self.assertTrue(0 <= min(delays) and max(delays) <= 21 and len(delays) > 5, delays)
        self.assertEqual(task.missed, 0)

    def test_overdue_is_marked(self):
        task = self.add('every 1h', max_runtime=30)
        self.scheduler.start(self.scheduler.tick(self.clocks.now, self.clocks.up)[0][0])
        self.clocks.pass_time(30)
        self.scheduler.tick(self.clocks.now, self.clocks.up)
        self.assertTrue(task.overdue and self.logged('WARNING job:', 'still running after 30s'))

    def test_removed_task_is_not_started(self):
        self.add('every 1s')
        self.scheduler.remove('job')
        self.assertEqual(self.tick(10), [])

    def test_next_run_is_unix_time(self):
        a, b = self.add('every 1h', 'a'), self.add('minute=30', 'b')
        self.tick(1)
        self.assertAlmostEqual(self.scheduler.next_run(a), self.clocks.now + 3599)
        self.assertEqual(self.scheduler.next_run(b), self.clocks.now - 1 + 1800)


class FailureLogTest(Folder):
    """What a failing job writes."""

    def setUp(self):
        super().setUp()
        self.task = torque.Task('job', torque.parse_schedule('every 1s'), lambda: None)

    def fail(self, error, now):
        try:
            raise error
        except type(error) as raised:
            self.task.failed(raised, now)

    def test_same_failure_is_summed_up(self):
        for second in range(600):
            self.fail(torque.LoggableError(f'no answer in {second}.5 s'), float(second))
        self.task.worked(600.0)
        lines = [line for line in self.lines if not line.startswith('DEBUG')]
        self.assertEqual(lines, [
            'WARNING job: no answer in 0.5 s',
            'WARNING job: still failing, 61 times in 1m: no answer in 60.5 s',
            'WARNING job: still failing, 181 times in 3m: no answer in 180.5 s',
            'WARNING job: still failing, 421 times in 7m: no answer in 420.5 s',
            'INFO job: works again, after 600 failures in 10m'])
        self.assertEqual((self.task.failures, self.task.last_error), (600, None))

    def test_flapping_does_not_flood(self):
        for second in range(0, 600, 2):
            self.fail(torque.LoggableError('refused'), float(second))
            self.task.worked(second + 1.0)
        self.assertLess(len([line for line in self.lines if 'DEBUG' not in line]), 25)

    def test_other_failure_is_said(self):
        self.fail(torque.LoggableError('refused'), 0.0)
        self.fail(torque.LoggableError('timed out'), 1.0)
        self.assertEqual(len(self.logged('WARNING')), 2)

    def test_bug_has_its_traceback_once(self):
        records = []
        self.task.log.addFilter(lambda record: records.append(record) or True)
        self.addCleanup(self.task.log.filters.clear)
        for second in range(90):
            self.fail(ZeroDivisionError('division by zero'), float(second))
        errors = [record for record in records if record.levelno == logging.ERROR]
        self.assertEqual([bool(record.exc_info) for record in errors], [True, False])
        self.assertIn('ZeroDivisionError: division by zero', errors[1].getMessage())

    def test_told_failure_is_not_repeated(self):
        error = torque.Unreachable('gone')
        error.told = True
        self.fail(error, 0.0)
        self.task.worked(1.0)
        self.assertEqual([line for line in self.lines if 'DEBUG' not in line], [])


class WorkersTest(Folder):
    """The threaded part, with the real clock."""

    def setUp(self):
        super().setUp()
        self.scheduler = torque.Scheduler()
        self.thread = threading.Thread(target=self.scheduler.serve, daemon=True)
        self.release = threading.Event()
        self.addCleanup(self.stop)

    def stop(self):
        self.release.set()
        self.scheduler.mail.put(self.scheduler.stop)
        self.thread.join(10)
        self.assertFalse(self.thread.is_alive())

    def add(self, name, run, text='every 0.1s', **kwargs):
        return self.scheduler.add(torque.Task(name, torque.parse_schedule(text), run, **kwargs))

    def test_bad_jobs_leave_others_alone(self):
        def raising(error):
            def run():
                raise error
            return run

        def own_socket():
            a, b = socket.socketpair()
            with a, b:
                a.close()
                b.shutdown(socket.SHUT_RDWR)
                b.sendall(b'x')
        for error in (ValueError('x'), torque.LoggableError('x'), SystemExit(3),
                      KeyboardInterrupt(), GeneratorExit()):
            self.add(type(error).__name__, raising(error))
        self.add('hung', self.release.wait)
        self.add('slow', lambda: self.release.wait(0.35))
        self.add('socket', own_socket)
        good = self.add('good', lambda: None)
        self.thread.start()
        wait_for(lambda: good.runs >= 15)
        tasks = self.scheduler.tasks
        self.assertEqual(good.failures, 0)
        self.assertTrue(all(tasks[name].failures >= 10 for name in (
            'ValueError', 'LoggableError', 'SystemExit', 'KeyboardInterrupt', 'socket')))
        self.assertTrue(tasks['hung'].runs == 0 and tasks['hung'].running_since)
        self.assertGreater(tasks['slow'].missed, 0)
        self.assertIn('SystemExit', tasks['SystemExit'].last_error)

    def test_workers_are_reused(self):
        names = set()
        tasks = [self.add(f'job{number}', lambda: names.add(threading.get_ident()))
                 for number in range(50)]
        self.thread.start()
        wait_for(lambda: min(task.runs for task in tasks) >= 5)
        self.assertLess(len(names), 20)

    def test_every_hung_run_has_its_thread(self):
        for number in range(40):
            self.add(f'hung{number}', self.release.wait)
        good = self.add('good', lambda: None)
        self.thread.start()
        wait_for(lambda: len(self.scheduler.running()) >= 40 and good.runs >= 5)
        self.release.set()
        wait_for(lambda: all(task.runs for task in self.scheduler.tasks.values()))
        wait_for(lambda: self.scheduler.workers <= torque.SPARE_WORKERS + 2)

    def test_refused_thread_is_tried_again(self):
        start, refusals = threading.Thread.start, []

        def refuse(thread):
            if len(refusals) < 1 and thread is not self.thread:
                refusals.append(1)
                raise RuntimeError("can't start new thread")
            start(thread)
        good = self.add('good', lambda: None)
        with mock.patch.object(threading.Thread, 'start', refuse):
            self.thread.start()
            wait_for(lambda: good.runs >= 2)
        self.assertEqual(len(self.logged('ERROR scheduler:', 'no new worker thread')), 1)

    def test_end_waits_for_runs(self):
        task = self.add('slow', lambda: self.release.wait(), 'every 1h')
        self.thread.start()
        wait_for(lambda: task.running_since)
        self.scheduler.mail.put(self.scheduler.stop)
        self.thread.join(10)
        self.assertEqual(self.scheduler.finish(0.05), [task])
        self.release.set()
        self.assertEqual(self.scheduler.finish(30), [])
        self.assertEqual(task.runs, 1)

# --- Jobs --------------------------------------------------------------------------------------

def job_config(folder, **settings):
    """Return the settings of a job as Config hands them over; engine and state_dir apart."""
    engine, state = settings.pop('engine', None), settings.pop('state_dir', folder)
    job = settings.pop('job', torque.InfluxDB)
    config = torque.JobConfig({option.name: option.parse(settings.pop(option.name, option.default))
                               for option in job.options})
    config.update({'job_name': 'test', 'dry_run': False, 'active': True, **settings})
    config.engine, config.state_dir = engine, state
    return config


class EngineStatsTest(Folder):
    def test_line_tells_the_state(self):
        stats = torque.Stats('host:4711', '0.9.8/0.13.8', 273600.0, 1258291, 2097152, 0, 317440, 0,
                             0, 1, 2, 3, 4, {'main': 1204, 'active': 31}, 0.0021)
        engine = types.SimpleNamespace(stats=lambda: stats)
        job = torque.EngineStats(job_config(self.folder, job=torque.EngineStats, engine=engine))
        job.run()
        self.assertEqual(self.lines, [
            'INFO test: host:4711 rTorrent 0.9.8/0.13.8 up 3d 4h; 1204 torrents, 31 active; '
            'up 1.2 MiB/s of 2.0 MiB, down 310 KiB/s; rpc 2.1 ms'])

    def test_what_is_unknown_is_left_out(self):
        stats = torque.Stats('host:1', '0.16', None, *[None] * 10,
                             {'main': None, 'active': None}, 0.1)
        engine = types.SimpleNamespace(stats=lambda: stats)
        torque.EngineStats(job_config(self.folder, job=torque.EngineStats, engine=engine)).run()
        self.assertIn('host:1 rTorrent 0.16; ? torrents, ? active; up ?, down ?', self.lines[0])


class LiveEngineStatsTest(Folder):
    def test_line_gone_and_back(self):
        for tcp in (False, True):
            with self.subTest(tcp=tcp):
                self.lines.clear()
                daemon = RTorrent(os.path.join(self.folder, f'rt{tcp}'), tcp=tcp)
                self.addCleanup(daemon.stop, signal.SIGKILL)
                job = torque.EngineStats(job_config(self.folder, job=torque.EngineStats,
                                                    engine=torque.Engine(daemon.url, 5)))
                job.run()
                self.assertRegex(self.lines[-1], r'^INFO test: \S+:\d+ rTorrent [\d.]+/[\d.]+ up '
                                 r'\w+( \w+)?; 0 torrents, 0 active; up 0 B/s, down 0 B/s; rpc ')
                daemon.stop()
                for _ in range(3):
                    with self.assertRaises(torque.Unreachable) as caught:
                        job.run()
                    self.assertTrue(caught.exception.told)
                self.assertEqual(len(self.logged('WARNING engine:', daemon.url)), 1)
                if not tcp:
                    again = RTorrent(daemon.folder)
                    self.addCleanup(again.stop)
                    job.run()
                    self.assertEqual(len(self.logged('INFO engine:', 'answers again, after')), 1)


class LineProtocolTest(unittest.TestCase):
    def test_names_and_values_are_escaped(self):
        line = torque.influx_line('a b,c', {'k=1': 'v w,x'}, {'f g': 'q"\\\n', 'i': 2 ** 40,
                                                             'b': True}, 1.5)
        self.assertEqual(line, 'a\\ b\\,c,k\\=1=v\\ w\\,x f\\ g="q\\"\\\\ ",i=1099511627776i,b=True'
                               ' 1500')

    def test_tags_are_parsed(self):
        self.assertEqual(torque.parse_tags('dc=home, rack=a 1'), {'dc': 'home', 'rack': 'a 1'})
        for text in ('dc', 'dc=', '=x', 'a=b,c'):
            with self.assertRaisesRegex(torque.UserError, 'are not tags'):
                torque.parse_tags(text)


class MetricsServer(Server):
    """Records what is posted, and answers with the given statuses in turn, then with 204."""

    def __init__(self, *answers):
        self.requests, self.answers = [], list(answers)
        super().__init__(self.respond)
        self.url = f'http://127.0.0.1:{self.port}'

    def respond(self, connection):
        stream = connection.makefile('rb')
        line, headers = stream.readline().decode().strip(), {}
        for row in iter(lambda: stream.readline().strip(), b''):
            name, _, value = row.decode().partition(':')
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get('content-length', 0)))
        self.requests.append((line, headers, body))
        answer = self.answers.pop(0) if self.answers else (204, '', '')
        status, extra, text = answer(body) if callable(answer) else answer
        connection.sendall(f'HTTP/1.1 {status} Said\r\nContent-Length: {len(text)}\r\n{extra}'
                           f'Connection: close\r\n\r\n{text}'.encode())


class InfluxDBTest(Folder):
    """Against a loopback server that records."""

    def job(self, *answers, **settings):
        self.server = MetricsServer(*answers)
        self.addCleanup(self.server.stop)
        engine = types.SimpleNamespace(stats=lambda: torque.Stats(
            'box:1', '0.9.8/0.13.8', 5.5, 1, 2, 3, 4, 5, 6, 7, 8, None, 9, {'main': 3}, 0.001))
        settings.setdefault('url', self.server.url)
        return torque.InfluxDB(job_config(self.folder, **{'engine': engine, **settings}))

    def test_request_has_documented_form(self):
        for settings, path, auth in (
                ({}, '/write?db=torque&precision=ms', None),
                ({'user': 'me', 'password': 'p w'}, '/write?db=torque&precision=ms',
                 'Basic bWU6cCB3'),
                ({'org': 'my org', 'bucket': 'b', 'token': 'T'},
                 '/api/v2/write?org=my+org&bucket=b&precision=ms', 'Token T'),
                ({'api': '2', 'token': 'T'}, '/api/v2/write?org=&bucket=torque&precision=ms',
                 'Token T'),
                ({'api': '3', 'token_file': self.write('token', 'T3\n')},
                 '/api/v3/write_lp?db=torque&precision=millisecond', 'Bearer T3'),
                ({'gzip': 'yes'}, '/write?db=torque&precision=ms', None)):
            with self.subTest(settings=settings):
                self.job(**settings).run()
                (line, headers, body), = self.server.requests
                self.assertEqual(line, f'POST {path} HTTP/1.1')
                self.assertEqual(headers.get('authorization'), auth)
                self.assertTrue(headers['content-type'].startswith('text/plain'))
                if 'gzip' in settings:
                    import gzip
                    self.assertEqual(headers['content-encoding'], 'gzip')
                    body = gzip.decompress(body)
                self.assertRegex(body.decode().splitlines()[0], (
                    r'^rtorrent,host=box engine_id="box:1",version="0.9.8/0.13.8",up_rate=1i,'
                    r'up_limit=2i,up_total=3i,down_rate=4i,down_limit=5i,down_total=6i,'
                    r'open_sockets=7i,max_open_sockets=8i,max_open_files=9i,rpc_time=0.001,'
                    r'uptime=5i \d{13}$'))

    def test_points_wait_for_the_server(self):
        job = self.job((503, '', 'busy'), (401, '', 'who?'), (404, '', 'database not found'),
                       series_host='')
        for number, word in enumerate(('503', '401', '404'), 1):
            with self.assertRaisesRegex(torque.LoggableError, f'{word}.*{number * 2} points are '
                                                              'kept'):
                job.run()
            with self.assertRaisesRegex(torque.LoggableError, word):
                job.deliver()                   # within the pause nothing is sent
            self.assertEqual(len(self.server.requests), number)
            job.retry_at = 0
        job.run()
        sent = self.server.requests[-1][2].decode().splitlines()
        times = [int(line.rsplit(' ', 1)[1]) for line in sent]
        self.assertEqual((len(sent), times), (8, sorted(times)))
        self.assertFalse(job.points)

    def test_pause_grows_and_obeys_retry_after(self):
        job, pauses = self.job(*[(500, '', '')] * 9, (429, 'Retry-After: 1234\r\n', '')), []
        for _ in range(10):
            with self.assertRaises(torque.LoggableError):
                job.run()
            pauses.append(round(job.retry_at - torque.elapsed_time()))
            job.retry_at = 0
        self.assertEqual(pauses, [5, 10, 20, 40, 80, 160, 300, 300, 300, 1234])

    def test_refused_points_block_nothing(self):
        def picky(body):
            return (400, '', '{"error":"field type conflict"}') if b'host,' in body else \
                (204, '', '')
        job = self.job(*[picky] * 20)
        job.run()
        self.assertFalse(job.points)
        written = [line for line, _, body in self.server.requests if b'host,' not in body]
        self.assertEqual(len(written), 2)           # rtorrent and rtorrent_views on their own
        warned = self.logged('WARNING', 'points of host were refused and dropped',
                             'field type conflict')
        self.assertEqual(len(warned), 1)

    def test_too_large_is_split(self):
        def small(body):
            return (413, '', 'too large') if body.count(b'\n') >= 3 else (204, '', '')
        job = self.job(*[small] * 50, series_host='')
        job.points.extend(f's v={number}i {number}' for number in range(20))
        job.run()
        sent = [row for _, _, body in self.server.requests if body.count(b'\n') < 3
                for row in body.decode().splitlines()]
        self.assertEqual([row for row in sent if row[0] == 's'],
                         [f's v={number}i {number}' for number in range(20)])

    def test_buffer_is_bounded(self):
        job = self.job(*[(500, '', '')] * 9, buffer='3', series_host='')
        for _ in range(3):
            with self.assertRaises(torque.LoggableError) as caught:
                job.run()
        self.assertIn('3 points are kept, the oldest 2 dropped', str(caught.exception))

    def test_backlog_survives_restart(self):
        job = self.job((500, '', ''), series_host='')
        with self.assertRaises(torque.LoggableError):
            job.run()
        job.cleanup()
        self.assertEqual(os.stat(os.path.join(self.folder, 'test.points')).st_mode & 0o777, 0o600)
        kept = list(job.points)
        again = self.job(series_host='')
        self.assertEqual(list(again.points), kept)
        again.run()
        self.assertEqual(self.server.requests[0][2].decode().splitlines()[:2], kept)
        self.assertEqual(os.listdir(self.folder), [])

    def test_backlog_is_saved_within_a_minute(self):
        job = self.job((500, '', ''), (500, '', ''), (500, '', ''), series_host='')
        with self.assertRaises(torque.LoggableError):
            job.run()
        with open(job.file, encoding='utf-8') as stream:
            self.assertEqual(len(stream.readlines()), 2)
        with self.assertRaises(torque.LoggableError):
            job.run()
        job.saved_at -= 60
        with self.assertRaises(torque.LoggableError):
            job.run()
        with open(job.file, encoding='utf-8') as stream:
            self.assertEqual(len(stream.readlines()), 6)

    def test_damaged_backlog_costs_its_line(self):
        self.write('test.points', b'good v=1i 1\n\xff\xfe\x00\nbroken v=\ngood v=2i 2\n')
        self.assertEqual(list(self.job().points), ['good v=1i 1', 'good v=2i 2'])

    def test_dry_run_sends_nothing(self):
        self.job(dry_run=True).run()
        self.assertEqual(self.server.requests, [])
        self.assertTrue(self.logged('dry run, not sent', 'rtorrent,host=box'))

    def test_host_is_pushed_without_rtorrent(self):
        def gone():
            raise torque.Unreachable('gone')
        job = self.job(engine=types.SimpleNamespace(stats=gone), disk_path=self.folder)
        with self.assertRaisesRegex(torque.Unreachable, 'gone'):
            job.run()
        lines = self.server.requests[0][2].decode().splitlines()
        self.assertEqual(len(lines), 2)
        self.assertRegex(lines[0], r'^host,host=\S+ load1=[\d.]+,.*memory_total=\d+i,.*net_sent=')
        self.assertRegex(lines[1], rf'^host,disk={self.folder},host=\S+ disk_total=\d+i,disk_free=')

    def test_wrong_settings_are_refused(self):
        for settings, words in (({'series': '', 'series_host': ''}, 'nothing to push'),
                                ({'url': 'ftp://x'}, 'no web address'),
                                ({'url': 'http://me:pw@x'}, 'as settings'),
                                ({'api': '4'}, 'allowed are 1, 2, 3')):
            with self.subTest(settings=settings), self.assertRaisesRegex(torque.UserError, words):
                self.job(**settings)
        with self.assertRaisesRegex(torque.LoggableError, 'No such file'):
            self.job(token_file='/nowhere/token').run()

    def test_secrets_stay_out_of_messages(self):
        job = self.job((401, '', 'unauthorized'), user='me', password='sesame')
        with self.assertRaises(torque.LoggableError) as caught:
            job.run()
        self.assertNotIn('sesame', f'{caught.exception} {job.config!r} {self.lines}')


class InfluxServer(Program):
    """A real InfluxDB 1.x on loopback, its data in a folder."""

    def __init__(self, folder, port=None, max_body=None):
        need('influxd')
        self.port, self.folder = port or free_port(), folder
        path = os.path.join(folder, 'influx.conf')
        os.makedirs(folder, exist_ok=True)
        with open(path, 'w', encoding='utf-8') as stream:
            stream.write(f"""
                reporting-disabled = true
                bind-address = "127.0.0.1:{free_port()}"
                [meta]
                dir = "{folder}/meta"
                [data]
                dir = "{folder}/data"
                wal-dir = "{folder}/wal"
                [monitor]
                store-enabled = false
                [http]
                bind-address = "127.0.0.1:{self.port}"
                max-body-size = {max_body or 25000000}
            """)
        super().__init__(['influxd', '-config', path])
        self.url = f'http://127.0.0.1:{self.port}'
        wait_for(self.ping)

    def ping(self):
        with contextlib.suppress(OSError), urllib.request.urlopen(f'{self.url}/ping') as answer:
            return answer.status == 204

    def query(self, text):
        """Return the rows of a query, as dicts with ts in milliseconds."""
        words = urllib.parse.urlencode({'db': 'torque', 'q': text, 'epoch': 'ms'})
        with urllib.request.urlopen(f'{self.url}/query', words.encode()) as answer:
            results = json.load(answer)['results'][0]
        return [dict(zip(series['columns'], row)) for series in results.get('series', ())
                for row in series['values']]


class LiveInfluxDBTest(Folder):
    def setUp(self):
        super().setUp()
        self.server = InfluxServer(os.path.join(self.folder, 'influx'))
        self.addCleanup(lambda: self.server.stop())
        self.server.query('CREATE DATABASE torque')

    def job(self, **settings):
        return torque.InfluxDB(job_config(os.path.join(self.folder, 'state'), **{
            'url': self.server.url, 'tags': 'odd tag=a b,x=y', **settings}))

    def test_values_are_read_back(self):
        daemon = RTorrent(os.path.join(self.folder, 'rt'))
        self.addCleanup(daemon.stop, signal.SIGKILL)
        content, info_hash = metafile('some data')
        daemon.load(content, info_hash)
        for gzip in ('no', 'yes'):
            job = self.job(engine=daemon.engine, gzip=gzip)
            sent = []
            job.post = lambda lines, post=job.post, sent=sent: (sent.extend(lines), post(lines))
            job.run()
            stamp = int(sent[0].rsplit(' ', 1)[1])
            row, = self.server.query(f'SELECT * FROM rtorrent WHERE time = {stamp}ms')
            self.assertEqual((row['version'], row['x'], row['odd tag']),
                             ('/'.join(daemon.engine.versions), 'y', 'a b'))
            for name, command in torque.GAUGES.items():
                expected = (daemon.engine.open().call(command, '')
                            if daemon.engine.has(command) else None)
                if name not in ('open_sockets', 'open_files'):
                    self.assertEqual(row.get(name), expected, name)
            self.assertIn(row['engine_id'], daemon.engine.engine_id)
            views, = self.server.query(f'SELECT * FROM rtorrent_views WHERE time = {stamp}ms')
            self.assertEqual((views['main'], views['stopped'], views['seeding']), (1, 1, 0))
            host = self.server.query(f'SELECT * FROM host WHERE time = {stamp}ms')
            self.assertEqual(sorted(bool(entry['disk']) for entry in host), [False, True])
            total = [entry['disk_total'] for entry in host if entry['disk']]
            self.assertEqual(total, [shutil.disk_usage(os.path.expanduser('~')).total])

    def test_outage_loses_and_repeats_nothing(self):
        engine = types.SimpleNamespace(stats=lambda: torque.Stats(
            'box:1', 'v', 1.0, next(numbers), *[0] * 9, {'main': 1}, 0.001))
        numbers = iter(range(1, 100))
        clock = mock.patch('torque.time.time', lambda start=time.time(): next(seconds) + start)
        seconds = iter(range(100))              # no two points in the same millisecond
        clock.start()
        self.addCleanup(clock.stop)
        job = self.job(engine=engine, series_host='')
        job.run()
        self.server.stop()
        for _ in range(3):
            job.retry_at = 0
            with self.assertRaisesRegex(torque.LoggableError, 'nobody listens there'):
                job.run()
        job.cleanup()
        job = self.job(engine=engine, series_host='')       # another process
        with self.assertRaises(torque.LoggableError):
            job.run()
        self.server = InfluxServer(self.server.folder, self.server.port)
        job.retry_at = 0
        job.run()
        rows = self.server.query('SELECT up_rate FROM rtorrent')
        self.assertEqual([row['up_rate'] for row in rows], [1, 2, 3, 4, 5, 6])

    def test_servers_own_words_are_logged(self):
        job = self.job(engine=None, series='', disk_path='')
        job.points.append('host v="text" 1')
        job.points.append('host v=1i 2')
        job.points.append('other v=1i 3')
        job.run()
        self.assertEqual(len(self.logged('WARNING', 'host', 'field type conflict')), 1)
        self.assertEqual(len(self.server.query('SELECT * FROM other')), 1)
        self.server.query('DROP DATABASE torque')
        with self.assertRaisesRegex(torque.LoggableError, '404.*database not found.*are kept'):
            job.run()

    def test_real_limit_splits_batches(self):
        self.server.stop()
        self.server = InfluxServer(self.server.folder, self.server.port, max_body=2000)
        job = self.job(engine=None, series='', disk_path='')
        job.points.extend(f'big v={number}i {number}' for number in range(1, 501))
        job.run()
        self.assertEqual(len(self.server.query('SELECT v FROM big')), 500)

# --- Measurements ------------------------------------------------------------------------------

REPLY_ROW = ['A' * 40, 'Some name of a torrent 2026', 734003200, 734003200, 1520, 20480, 0, 2 ** 33, 1,
             1, 1, 'label', '/srv/data/Some name of a torrent 2026', 1700000000, '']


def reply_xml(rows):
    """Return the answer of rTorrent 0.9.8 to a d.multicall2."""
    def value(item):
        if isinstance(item, list):
            return ('<value><array><data>\r\n' + '\r\n'.join(map(value, item))
                    + '\r\n</data></array></value>')
        kind = 'string' if isinstance(item, str) else 'i8'
        return f'<value><{kind}>{item}</{kind}></value>'
    return ('<?xml version="1.0" encoding="UTF-8"?>\r\n<methodResponse>\r\n<params>\r\n<param>'
            f'{value(rows)}</param>\r\n</params>\r\n</methodResponse>\r\n').encode()


def fastest(function, times=7):
    """Return the least milliseconds that a call takes."""
    best = float('inf')
    for _ in range(times):
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return best * 1000


def bench_decode():
    for count in (1000, 10000):
        rows = [REPLY_ROW] * count
        content = reply_xml(rows)
        text = json.dumps({'jsonrpc': '2.0', 'id': 0, 'result': rows}).encode()
        assert torque.xml_reply(content) == rows == torque.json_reply(text, 1)[0]
        loads = fastest(lambda: xmlrpc.client.loads(content))
        ours, by_json = (fastest(lambda: torque.xml_reply(content)),
                         fastest(lambda: torque.json_reply(text, 1)))
        print(f'decode {count:6} rows: xmlrpc.client {loads:6.1f} ms, torque XML {ours:6.1f} ms '
              f'({loads / ours:.1f} x), JSON {by_json:5.1f} ms ({loads / by_json:.1f} x)')


def per_second(step, seconds=0.3):
    """Return how often step() can be called in a second; it gets the last result."""
    count, value, began = 0, None, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(50):
            value = step(value)
        count += 50
    return count / (time.perf_counter() - began)


def bench_schedules():
    start = 1700000000
    for text in ('second=*/15', 'minute=*', 'hour=3', '*/5 * * * *', '0 4 * * mon', '@monthly',
                 'hour=12 "day=3rd sun"', 'month=2 day=29', 'week=53 hour=12',
                 'hour=3 timezone=Europe/Berlin'):
        try:
            schedule = torque.parse_schedule(text)
        except torque.UserError as error:
            print(f'next runs of {text}: {error}')
            continue
        line = f'next runs a second, {text:31} torque {per_second(lambda after: schedule.next(start if after is None else after) or start):9,.0f}'
        with contextlib.suppress(ImportError):
            from apscheduler.triggers.cron import CronTrigger
            if '=' in text:
                fields = dict(word.split('=') for word in shlex.split(text))
                trigger = CronTrigger(**{'timezone': 'UTC', **fields})
                now = datetime.datetime.fromtimestamp(start, datetime.timezone.utc)
                rate = per_second(lambda last: trigger.get_next_fire_time(last, last or now))
                line += f', APScheduler {rate:8,.0f}'
        with contextlib.suppress(ImportError):
            import croniter
            if '=' not in text:
                cron = croniter.croniter(text, start)
                line += f', croniter {per_second(lambda last: cron.get_next(float)):8,.0f}'
        print(line)


def bench_lateness(seconds=8):
    for count in (1, 100, 1000):
        scheduler, late = torque.Scheduler(), []

        def run(schedule):
            now = torque.elapsed_time()
            late.append((now - schedule.start) % schedule.seconds)

        for number in range(count):
            schedule = torque.parse_schedule('every 1s')
            scheduler.add(torque.Task(f'job{number}', schedule,
                                      lambda schedule=schedule: run(schedule)))
        for task in scheduler.tasks.values():           # all are due at the same moment
            task.schedule.start = schedule.start
        threading.Timer(seconds, lambda: scheduler.mail.put(scheduler.stop)).start()
        scheduler.serve()
        late = sorted(late[2 * count:])                 # without the start
        print(f'lateness of {count:4} jobs a second: p50 {late[len(late) // 2] * 1000:6.2f} ms, '
              f'p99 {late[int(len(late) * .99)] * 1000:6.2f} ms, max {late[-1] * 1000:6.2f} ms '
              f'({len(late)} runs, {scheduler.workers} workers)')


def bench_double():
    """Return a double of rTorrent that answers what EngineStats asks."""
    def answer(connection):
        body = Server.request(connection)
        if b'listMethods' in body:
            result = ['system.listMethods', *torque.GAUGES.values()]
        else:
            result = [[0]] * body.count(b'methodName</name>')
        text = torque.xml_request('x', [result]).replace(b'methodCall', b'methodResponse')
        connection.sendall(scgi_answer(re.sub(b'<methodName>x</methodName>', b'', text)))
    return Server(answer)


def bench_process():
    server = bench_double()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'torque.ini')
        with open(path, 'w', encoding='utf-8') as stream:
            stream.write(f'[TORQUE]\nscgi_url = {server.url}\njob.connstats.schedule = every 1m\n'
                         f'state_dir = {folder}\n')
        program = os.path.join(HERE, 'torque.py')
        for name, words in (('bare interpreter', ['-c', 'pass']),
                            ('--help', [program, '--help']),
                            ('one job once', [program, '-c', path, '--run-once', 'connstats'])):
            wall, cpu = [], []
            for _ in range(10):
                began = time.perf_counter()
                process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL,
                                           stderr=subprocess.DEVNULL)
                _, status, usage = os.wait4(process.pid, 0)
                wall.append(time.perf_counter() - began)
                cpu.append(usage.ru_utime + usage.ru_stime)
                process.returncode = os.WEXITSTATUS(status)
                assert process.returncode == 0, words
            print(f'{name}: {min(wall):.3f} s wall, {min(cpu):.3f} s CPU (best of 10)')
        daemon = start_torque('-c', path)
        wait_for(lambda: daemon.seen('connstats', 'rpc'))

        def spent():
            pid, switches, ran = daemon.process.pid, 0, 0
            for task in os.listdir(f'/proc/{pid}/task'):
                with open(f'/proc/{pid}/task/{task}/status', encoding='ascii') as stream:
                    status = stream.read()
                switches += sum(map(int, re.findall(r'ctxt_switches:\s+(\d+)', status)))
                with open(f'/proc/{pid}/task/{task}/schedstat', encoding='ascii') as stream:
                    ran += int(stream.read().split()[0])
            resident = re.search(r'VmRSS:\s+(\d+)', status)
            return switches, ran / 1e6, int(resident[1]) / 1024
        if os.path.isdir('/proc'):
            before, began = spent(), time.monotonic()
            time.sleep(60)
            after, minutes = spent(), (time.monotonic() - began) / 60
            print(f'one job a minute: {(after[0] - before[0]) / minutes:.1f} context switches and '
                  f'{(after[1] - before[1]) / minutes:.2f} ms CPU a minute, {after[2]:.1f} MiB '
                  'resident')
        daemon.stop()
    server.stop()


def bench():
    """Print all measurements; nothing here passes or fails."""
    print(f'torque {torque.VERSION}, Python {sys.version.split()[0]}, {os.cpu_count()} CPUs')
    bench_process()
    bench_lateness()
    bench_schedules()
    bench_decode()


# --- The test program --------------------------------------------------------------------------

def load_tests(loader, tests, pattern):
    tests.addTests(doctest.DocTestSuite(torque))
    return tests


def main():
    if sys.argv[1:] == ['bench']:
        bench()
        return 0
    program = unittest.main(exit=False)
    result = program.result
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    print(f'{result.testsRun - failed - len(result.skipped)} passed, {failed} failed, '
          f'{len(result.skipped)} skipped')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
