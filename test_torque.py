#!/usr/bin/env python3
"""Tests of torque: `python3 test_torque.py`; `... bench` measures, `... soak` too.

Sections follow those of torque.py. rTorrent and InfluxDB are the real programs, started on
loopback in a temporary folder; where they are not installed those tests are skipped, and with
TORQUE_LIVE=1 fail instead. TORQUE_RTORRENTS names the rTorrent commands to test, one a line.
"""
import ast
import bisect
import collections
import contextlib
import datetime
import doctest
import hashlib
import http.client
import http.server
import importlib
import io
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import unittest
import urllib.parse
import urllib.request
import warnings
import xmlrpc.client
from importlib.metadata import version
from unittest import mock

import torque
from torque import (Action, ArgsTemplate, BUILT_IN, Command, CommandTemplate, config_ini, Engine,
                    Filter, find_url, HashNotFound, ItemCommand, list_torrents, LoggableError,
                    Mistakes, Move, parse_address, parse_condition, parse_due, parse_metafile,
                    parse_schedule, PidFile, RpcError, Scheduler, Settings, Task, Template,
                    TORRENT_FIELDS, Unreachable, UserError, xml_batch, xml_reply)

HERE = os.path.dirname(os.path.abspath(__file__))
LIVE = bool(os.environ.get('TORQUE_LIVE'))
RTORRENTS = [shlex.split(line) for line in os.environ.get(
    'TORQUE_RTORRENTS', 'rtorrent').splitlines() if line.strip()]


# --- What the tests share ------------------------------------------------------------------------

def need(command):
    """Skip a live test where its program is not installed; fail where it has to be."""
    if not shutil.which(command):
        if LIVE:
            raise AssertionError(f'{command} is not installed, and TORQUE_LIVE is set')
        raise unittest.SkipTest(f'{command} is not installed')


def wait_for(what, *args, seconds=20.0):
    """Return the first true value of what(*args), watching closely; fail after a while."""
    end = time.monotonic() + seconds
    while True:
        found = what(*args)
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


def metafile(name, files=1, announce='http://127.0.0.1:1/announce', **info):
    """Return a metafile and its info-hash.

    files: the content of its only file, or {path: content}; a number is so many zero bytes.
    """
    info = {'name': name, 'piece length': 16384, **info}
    if isinstance(files, dict):
        whole = b''.join(map(bytes, files.values()))
        info['files'] = [{'path': path.split('/'), 'length': len(bytes(content))}
                         for path, content in files.items()]
    else:
        whole = bytes(files)
        info.setdefault('length', len(whole))
    pieces = [hashlib.sha1(whole[at:at + 16384]).digest() for at in range(0, len(whole), 16384)]
    info.setdefault('pieces', b''.join(pieces))
    return (bencode({'announce': announce, 'info': info}),
            hashlib.sha1(bencode(info)).hexdigest().upper())


def write_ini(folder, url, text=''):
    """Write torque.ini, its state beside it; return its path."""
    text = f'[TORQUE]\nscgi_url = {url}\nstate_dir = {folder}/state\n' + textwrap.dedent(text)
    put_data(folder, 'torque.ini', text.encode())
    return os.path.join(folder, 'torque.ini')


def put_data(folder, name, files=1):
    """Write what metafile() tells of."""
    if not isinstance(files, dict):
        files = {'': files}
    for path, content in files.items():
        path = os.path.join(folder, name, path).rstrip('/')
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as stream:
            stream.write(bytes(content))


def tree(folder):
    """Return path below a folder -> content, of all files that are not a program's own."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = {*folders} - {'session', 'state'}
        for name in names:
            path = os.path.join(parent, name)
            if not name.endswith(('.ini', '.rc', '.sock')):
                with open(path, 'rb') as stream:
                    found[os.path.relpath(path, folder)] = stream.read()
    return found


def open_text(path):
    """Return the text of a file, nothing where there is none."""
    try:
        with open(path, encoding='utf-8', errors='replace') as stream:
            return stream.read()
    except FileNotFoundError:
        return ''


def sides(table):
    """Give the two sides of each line of a table; lines without >> are headings or notes."""
    for line in table.splitlines():
        left, arrow, right = line.partition('>>')
        if arrow:
            yield left.strip(), right.strip()


class Case(unittest.TestCase):
    """A test case with short words for what is refused, and for tables."""

    def fails(self, words, function, *params, kind=LoggableError, **options):
        """Call; return the error, whose one line has to hold all the words between bars."""
        with self.subTest(words=words, params=str(params)[:200], options=options):
            with self.assertRaises(kind) as caught:
                function(*params, **options)
            told = str(caught.exception)
            self.assertNotIn('\n', told)
            for word in words.split('|'):
                self.assertIn(word, told)
            return caught.exception

    def refused(self, words, function, *params, **options):
        return self.fails(words, function, *params, kind=UserError, **options)

    def enter(self, context):
        """Enter a context until the test is over."""
        context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def gives(self, function, *table):
        """Call with the first of each row; it has to give the last."""
        for *params, expected in table:
            with self.subTest(function.__name__, params=params):
                self.assertEqual(function(*params), expected)


class Folder(Case):
    """A test with a temporary folder of its own, its log kept in self.lines."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix='torque-')
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.lines = []
        root, ours = logging.getLogger(), logging.getLogger('torque')
        handler = logging.Handler()
        handler.addFilter(logging.Filter('torque'))
        handler.emit = lambda record: self.lines.append(
            f'{record.levelname} {record.name[7:]}: {record.getMessage()}')
        self.enter(mock.patch.object(root, 'handlers', [handler]))
        for logger in root, ours:
            self.addCleanup(logger.setLevel, logger.level)
        ours.setLevel(logging.DEBUG)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def write(self, name, text):
        """Write a file in the folder and return its path."""
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as stream:
            stream.write(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return path

    def ended(self, program):
        """Have a program or a double ended after the test; return it."""
        self.addCleanup(program.end)
        return program

    def logged(self, *words):
        """Return the log lines that hold all the words."""
        return [line for line in self.lines if all(word in line for word in words)]

    # What needs root

    def as_root(self, *words):
        """Run what needs rights that a test may not have: then it is skipped."""
        try:
            done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            self.skipTest(f'{words[0]}: {error}')
        if done.returncode:
            self.skipTest(f'not permitted here: {words[0]}: {done.stdout.decode().strip()}')

    def mount(self, place, *words):
        """Mount something on a folder of the test, for as long as it runs; return the folder."""
        place = self.path(place)
        if not os.path.exists(place):
            os.makedirs(place)
        self.as_root('mount', *words, place)
        self.addCleanup(subprocess.run, ['umount', '-l', place], stderr=subprocess.DEVNULL)
        return place

    def bind(self, source, place):
        return self.mount(place, '--bind', source)

    def disk(self, place, options):
        return self.mount(place, '-t', 'tmpfs', '-o', options, 'none')


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

    def wait(self, *words):
        """Return the output lines that hold all the words, once there are some."""
        return wait_for(self.seen, *words)

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

    def end(self):
        self.stop(signal.SIGKILL)


def start_torque(*words, **kwargs):
    """Start torque.py as a user does, and return the Program."""
    return Program([sys.executable, torque.__file__, *words], **kwargs)


def run_torque(*words, prefix=(), **kwargs):
    """Run torque.py to its end; return exit status, standard output, standard error."""
    done = subprocess.run([*prefix, sys.executable, torque.__file__, *words],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=60, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def rtorrent_command(number):
    """Return one of RTORRENTS, or skip the test."""
    if number >= len(RTORRENTS):
        raise unittest.SkipTest('TORQUE_RTORRENTS names no other rTorrent')
    return RTORRENTS[number]


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
        self.engine = Engine(self.url, 10)
        try:
            wait_for(self.answers)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def answers(self):
        if self.process.poll() is not None:
            raise AssertionError(f'rTorrent ended: {self.lines}')
        with contextlib.suppress(RpcError):
            return self.engine.carry(xml_batch([('system.pid', '')]))

    def load(self, content, info_hash, *commands, start=False):
        """Load a metafile by content and wait until the item is there."""
        proxy = self.engine.open()
        (proxy.load.raw_start if start else proxy.load.raw)('', content, *commands)

        def there():
            with contextlib.suppress(HashNotFound):
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
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection = self.sock.accept()[0]
                self.connections.append(connection)
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError), connection:
            self.answer(connection)

    def end(self):
        self.over.set()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(5)             # it may have accepted one just now
        self.sock.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def received(connection):
        """Read one SCGI request and return all of it, and its body."""
        request, whole = b'', None
        while not whole or len(request) < len(whole[1]) + 2 + int(whole[1]) + int(whole[2]):
            part = connection.recv(65536)
            if not part:
                raise ConnectionError
            request += part
            whole = re.match(rb'(\d+):CONTENT_LENGTH\0(\d+)\0', request)
        return request, request[len(whole[1]) + 2 + int(whole[1]):]

    @staticmethod
    def request(connection):
        """Read one SCGI request and return its body."""
        return Server.received(connection)[1]


class WebServer(Server):
    """A double of a web server: keeps (head, body) of requests; answer(connection, head, body)."""

    def __init__(self, answer):
        self.requests, self.reply = [], answer
        super().__init__(self.respond)
        self.url = f'http://127.0.0.1:{self.port}'

    def respond(self, connection):
        with connection.makefile('rb') as stream:
            head = ''.join(iter(lambda: stream.readline().decode(), '\r\n'))
            length = re.search(r'(?i)Content-length: (\d+)|$', head)[1] or 0
            self.requests.append((head, stream.read(int(length))))
        self.reply(connection, *self.requests[-1])


def page(body, status='200 OK', header='X: y'):
    """Return an answer as web servers send it."""
    return f'HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{header}\r\n\r\n'.encode() + body


def scgi_answer(body, content_type='text/xml'):
    """Return an SCGI answer as rTorrent sends it."""
    body = body if isinstance(body, bytes) else body.encode()
    return (f'Status: 200 OK\r\nContent-Type: {content_type}\r\n'
            f'Content-Length: {len(body)}\r\n\r\n').encode() + body


# --- Values --------------------------------------------------------------------------------------

class HeadTest(Case):
    @unittest.skipIf(sys.version_info < (3, 10), 'this Python does not play an older one so far')
    def test_older_pythons_show_what_is_needed(self):
        content = open_text(torque.__file__)
        self.assertTrue(content.isascii())
        for minor in 6, 7:
            with self.subTest(minor=minor), self.assertRaises(SyntaxError) as caught:
                ast.parse(content, feature_version=(3, minor))
            line = content.splitlines()[caught.exception.lineno - 1]
            self.assertEqual(line, '(torque_needs_python_3_8 := True)')


class ValuesTest(Case):
    def test_text_becomes_values(self):
        for parse, table in (
                (torque.parse_bool, '''
                    ' Yes ' >> True
                    'ON' >> True
                    1 >> True
                    '+' >> True
                    'off' >> False
                    'F' >> False
                    '0' >> False'''),
                (torque.parse_duration, '''
                    '15' >> 15.0
                    0.25 >> 0.25
                    '90s' >> 90.0
                    ' 1H 30m ' >> 5400.0
                    '1w2d' >> 777600.0
                    '1.5h' >> 5400.0
                    '5 m' >> 300.0
                    '0' >> 0.0
                    '10000w' >> 6048000000.0'''),
                (torque.parse_size, '''
                    '0' >> 0
                    512 >> 512
                    '1.5k' >> 1536
                    '10 MiB' >> 10485760
                    '4g' >> 4294967296
                    '2TB' >> 2199023255552
                    '7b' >> 7'''),
                (torque.parse_count, '''
                    ' 10 ' >> 10
                    0 >> 0
                    '007' >> 7''')):
            for text, value in sides(table):
                with self.subTest(parse=parse.__name__, text=text):
                    self.assertEqual(repr(parse(ast.literal_eval(text))), value)    # True is not 1

    def test_bad_values_are_refused(self):
        for parse, words, texts in (
                (torque.parse_bool, 'is neither yes nor no; allowed are yes no',
                 '|maybe|2|y e s|None|truefalse'),
                (torque.parse_duration, 'is not a length of time; allowed are e.g. 15s 5m (minut',
                 '|soon|-5|1h30|5m5m|1 2|5x|1..5s|.5|m|1e3|None|5m;|1h-30m|inf|nan|10000w1s|1M|'
                 '1h30M|5 min|5 minutes|' + '9' * 15 + '|' + '9' * 310),
                (torque.parse_size, 'is not a size; allowed are e.g. 100m',
                 '|-1|5x|1p|k|1 2|1,5k|1e3|nan|' + '9' * 310),
                (torque.parse_count, 'is not a whole number of 0 or more',
                 '|-1|1.5|ten|1k|0x10|\u0661|None|' + '9' * 19)):
            for text in texts.split('|'):
                self.refused(words, parse, text)
            self.refused(words, parse, None)

    def test_values_become_text(self):
        for show, table in (
                (torque.show_duration, '''
                    0 >> 0s
                    0.25 >> 250ms
                    1 >> 1s
                    59.9 >> 59s
                    60 >> 1m
                    3601 >> 1h
                    5430 >> 1h 30m
                    86399 >> 23h 59m
                    273600 >> 3d 4h
                    31536000 >> 52w 1d'''),
                (torque.show_size, '''
                    0 >> 0 B
                    1023 >> 1023 B
                    1024 >> 1 KiB
                    1258291 >> 1.2 MiB
                    4294967296 >> 4.0 GiB
                    5629499534213120 >> 5120.0 TiB''')):
            for number, text in sides(table):
                self.gives(show, (float(number), text))
        self.gives(torque.quoted, ('a\nb\x1b[31m', r"'a\nb\x1b[31m'"), (None, "'None'"),
                   ('x' * 198, repr('x' * 198)), ('x' * 199, "'" + 'x' * 196 + '...'))
        words = ['hour', 'minute']
        self.gives(torque.nearest, ('minutes', words, "; did you mean 'minute'?"),
                   ('zebra', words, ''))


# --- Schedule ------------------------------------------------------------------------------------

try:
    import zoneinfo
    zoneinfo.ZoneInfo('Europe/Berlin')
    NO_ZONES = ''
except (ImportError, KeyError) as error:
    NO_ZONES = f'no time zone data here: {error}'

with warnings.catch_warnings():             # its own are not ours to mend
    warnings.simplefilter('ignore')
    try:
        from apscheduler.triggers.cron import CronTrigger
    except ImportError:
        CronTrigger = None
    try:
        import croniter
        CRONITER = int(version('croniter').split('.')[0])
    except ImportError:
        croniter, CRONITER = None, 0

MONTHS = 'jan feb mar apr may jun jul aug sep oct nov dec'.split()
WEEKDAYS = 'mon tue wed thu fri sat sun'.split()
POSITIONS = '1st 2nd 3rd 4th 5th last'.split()
BASE = '12:00'                              # on a Wednesday in a leap year
# By zone: the same rules without a database; its changes of 2024, forward and back.
ZONES = {
    'Europe/Berlin': ('CET-1CEST,M3.5.0,M10.5.0/3', 1711846800, 1729990800),
    'America/New_York': ('EST5EDT,M3.2.0,M11.1.0', 1710054000, 1730613600),
    'Australia/Lord_Howe': ('<+1030>-10:30<+11>-11,M10.1.0,M4.1.0', 1728142200, 1712415600),
    'America/Havana': ('CST5CDT,M3.2.0/0,M11.1.0/1', 1710046800, 1730610000),
    'Africa/Cairo': ('EET-2EEST,M4.5.5/0,M10.5.4/24', 1714082400, 1730408400)}


@contextlib.contextmanager
def local_time(rules):
    """Make a time zone the local one for a while."""
    try:
        with mock.patch.dict(os.environ, TZ=rules):
            time.tzset()
            yield
    finally:
        time.tzset()


def unix(text):
    """Return the Unix seconds of a UTC time; a year or date left out is that of BASE."""
    if text == 'never':
        return None
    text = text if '-' in text else '02-28T' + text
    text = text if text.startswith('2') else '2024-' + text
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.timezone.utc).timestamp()


def runs(schedule, after, number):
    """Return the first `number` due times after `after`; None ends them."""
    found = []
    while len(found) < number and after is not None:
        after = schedule.next(after)
        found.append(after)
    return found

# A schedule >> the UTC times due after BASE, or the first of them; `never` ends them.
GRAMMAR = '''
second=*/15 >> 12:00:15 12:00:30
hour=12 "day=3rd sun" >> 03-17T12:00 04-21T12:00
minute=*/10 >> 12:10 12:20
*/5 * * * * >> 12:05 12:10
year=2024-2026/2 month=dec >> 12-01 2026-12-01 never
month=Jan-MAR,9/2 >> 03-01 09-01 11-01 2025-01-01
day=last >> 02-29 03-31 04-30
"day=last fri" >> 03-29 04-26
"day=LAST,15,1st Mon" >> 02-29 03-04 03-15 03-31 04-01
"day=5th wed" >> 05-29 07-31
day=29-31/2 month=2,4 >> 02-29 04-29 2025-04-29
week=10 >> 03-04 03-05
week=53 >> 2026-12-28 2026-12-29 2026-12-30 2026-12-31 2027-01-01
day_of_week=0 >> 03-04 03-11
day_of_week=sun >> 03-03 03-10
day_of_week=mon-fri/2 hour=9 >> 03-01T09:00 03-04T09:00 03-06T09:00
day_of_week=fri day=13 >> 09-13 12-13
hour=22-23,0-2/2 >> 22:00 23:00 02-29T00:00 02-29T02:00
minute=0-20/10,30,55/2 >> 12:10 12:20 12:30 12:55 12:57

Fields left out: finer ones start at their lowest value, coarser ones mean "every".
hour=3 >> 02-29T03:00 03-01T03:00
minute=5 >> 12:05 13:05
second=5 >> 12:00:05 12:01:05
day=1 >> 03-01 04-01
month=6 >> 06-01 2025-06-01
year=2025 >> 2025-01-01 never
month=3 hour=2 >> 03-01T02:00 03-02T02:00
year=2025 minute=7 >> 2025-01-01T00:07 2025-01-01T01:07

cron; to croniter 5-5 is the whole cycle, every day
@hourly >> 13:00 14:00
@daily >> 02-29 03-01
@Midnight >> 02-29
@weekly >> 03-03 03-10
@monthly >> 03-01 04-01
@yearly >> 2025-01-01 2026-01-01
@annually >> 2025-01-01
0 0 * * 0 >> 03-03
0 0 * * 7 >> 03-03
0 0 * * sat-sun >> 03-02 03-03 03-09
0 0 * * SUN-tue >> 03-03 03-04 03-05 03-10
30 4 1,15 jan-mar/2 * >> 03-01T04:30 03-15T04:30 2025-01-01T04:30
0 0 5-5 * * >> 03-05 04-05

Day and weekday are alternatives where both restrict, which a field that begins with *
does not, as in cron(5).
0 0 13 * fri >> 03-01 03-08 03-13 03-15
0 0 */2 * mon >> 03-11 03-25 04-01 04-15
0 0 13 * *,fri >> 03-13 04-13
0 0 */2 * 0-6 >> 02-29 03-01 03-03
0 0 1-31 * */5 >> 03-01 03-03 03-08
0 0 1-31 * 1-5 >> 02-29 03-01 03-02 03-03
0 0 13 * 0-6 >> 02-29 03-01

A step without an end ends on Saturday: 7 is Sunday once more.
0 0 * * 1/2 >> 03-01 03-04 03-06
0 0 * * 7/3 >> 03-02 03-03 03-06 03-09

Ranges go round.
hour=22-2 >> 22:00 23:00 02-29 02-29T01:00 02-29T02:00 02-29T22:00
0 22-2/2 * * * >> 22:00 02-29 02-29T02:00 02-29T22:00
minute=50-10/15 >> 12:05 12:50 13:05
month=nov-jan >> 11-01 12-01 2025-01-01
month=apr-mar/2 >> 04-01 06-01 08-01 10-01 12-01 2025-02-01 2025-04-01
0 0 1 apr-mar/2 * >> 04-01 06-01 08-01 10-01 12-01 2025-02-01 2025-04-01
day_of_week=sat-mon >> 03-02 03-03 03-04 03-09
0 0 * * fri-tue/2 >> 03-01 03-03 03-05 03-08
0 0 * * 7-1 >> 03-03 03-04 03-10
day=30-2 >> 03-01 03-02 03-30
week=52-1 >> 12-23
'''
# A schedule >> words of the message.
REFUSED = '''
jitter=1m >> is not understood; allowed are an interval (every 15s), fields|or cron (*/5
minute=5 7 >> is not understood
day=3rd sun >> is not understood
"minute=5 >> No closing quotation
minutes=5 >> field 'minutes' is not known; allowed are year month|mean 'minute'?
=5 >> field '' is not known
Hour=5 >> field 'Hour' is not known|mean 'hour'?
hour=1 hour=2 >> schedule field 'hour' is given twice
hour= >> hour '' is not understood; allowed are * */n a a-b a-b/n
hour=1,,2 >> hour '' is not understood
hour=-1 >> hour '-1' is not understood
hour=*-5 >> hour '*-5' is not understood
hour=24 >> hour '24' is not in 0-23
day=0 >> day '0' is not in 1-31
day=3rd >> day '3rd' is not in 1-31
"day=3rd foo" >> day_of_week 'foo' is not in 0-6 or mon|sun
"day=6th sun" >> day '6th sun' is not understood
year=1969 >> year '1969' is not in 1970-9999
month=13 >> month '13' is not in 1-12 or jan|dec
day_of_week=7 >> day_of_week '7' is not in 0-6 or mon|sun
year=2030-2027 >> year '2030-2027' is an empty range
minute=*/0 >> minute '*/0' has a step that is not in 1-59
month=*/12 >> month '*/12' has a step that is not in 1-11
60 * * * * >> minute '60' is not in 0-59
* * * * 8 >> day of week '8' is not in 0-7 or sun|sat
x * * * * >> minute 'x' is not in 0-59
* * * * >> has 4 words; cron has five fields
1 2 3 4 5 6 7 8 >> has 8 words; cron has five fields: minute hour day month weekday
month=2 day=30 >> can never fire: there is no such date
0 0 31 2,4 * >> never fire
week=53 month=6 >> never fire
year=2023 month=2 day=29 >> never fire
"day=1st mon" day_of_week=tue >> never fire
year=2020 >> can never fire: there is no such date to come
potato >> 'potato' is not a length of time
every >> '' is not a length of time
every 1M >> '1M' is not a length of time; allowed are e.g. 15s 5m (minutes)
30M >> '30M' is not a length
@every 1h 2M >> '1h 2M' is not a length
5 minutes >> '5 minutes' is not a length of time
every 5min >> '5min' is not a length
@every >> '' is not a length
@every day >> 'day' is not a length
@reboot >> '@reboot' is no schedule; allowed are @hourly @daily|@every 5m, which runs at
@dayly >> '@dayly' is no schedule
daily >> 'daily' is no schedule; allowed are @hourly
every 1h30 >> 1h30' is not a length of time
every 0 >> 0' is too short; at least 0.1s
jitter=5 >> is not understood
minute=5 jitter=x >> 'x' is not a length
'''
# A zone; 1 its change forward, 2 the one back; a schedule >> the seconds from the change to the
# due times that follow the two hours before it. What a change skips is one run, at 0.
CHANGES = (
    ('Europe/Berlin', 1, '''
        hour=2 minute=0,30 >> 0 82800 84600
        hour=1-4 minute=30 >> -1800 0 1800 5400
        hour=1,2 minute=59 second=59 >> -1 0 82799 86399
        hour=*/2 >> 0 3600 10800
        hour=3 >> 0 86400
        "day=last sun" hour=2 minute=59 >> 0 2419140
        minute=*/30 >> -5400 -3600 -1800 0 1800 3600
        30 * * * * >> -5400 -1800 1800 5400'''),
    ('Europe/Berlin', 2, '''
        hour=2 minute=0,30 >> -3600 -1800 86400 88200
        30 1-3 * * * >> -5400 -1800 5400 84600
        hour=2 minute=59 second=*/30 >> -60 -30 89940
        hour=3 >> 3600 90000
        hour=* >> -3600 0 3600'''),
    ('America/New_York', 1, '''
        "day=2nd sun" hour=2 minute=59 >> 0
        @hourly >> -3600 0 3600'''),
    ('America/New_York', 2, '''
        hour=1 minute=15 >> -2700 87300
        minute=15 >> -6300 -2700 900 4500'''),
    ('Australia/Lord_Howe', 1, '''
        hour=2 minute=*/10 >> 0 600 1200 84600
        15 2 * * * >> 0 85500
        minute=*/30 >> -5400 -3600 -1800 0 1800'''),
    ('Australia/Lord_Howe', 2, '''
        hour=1 minute=*/15 >> -3600 -2700 -1800 -900 84600
        0 1,2 * * * >> -3600 1800
        minute=45 >> -4500 -900 900 4500'''),
    ('America/Havana', 1, '''
        @daily >> 0 82800
        day=10 >> 0
        @hourly >> -3600 0 3600'''),
    ('America/Havana', 2, '''
        @daily >> -3600 86400
        30 0 3 11 * >> -1800 31537800'''),
    ('Africa/Cairo', 1, '''
        15 0 * * fri >> 0 602100'''),
    ('Africa/Cairo', 2, '''
        hour=23 minute=30 >> -1800 88200
        hour=0 >> 3600
        day=31 hour=* minute=0 >> -3600 0 5187600'''))

# Beyond torque's grammar: croniter reads it.
BEYOND = '''
0 0 L * * >> 02-29 03-31 04-30
0 0 * * fri#2 >> 03-08 04-12
0 0 ? * 5 >> 03-01
0 0 * * L5 >> 03-29 04-26
*/5 * * * * 30 >> 12:00:30 12:05:30
* * * * * * >> 12:00:01 12:00:02
0 12 * * * 0 2027 >> 2027-01-01T12:00
'''

# For a walk by hand: spellings of hour, minute, second, day_of_week and what they allow.
PARTS = (
    (('*', range(24)), ('*', range(24)), ('2', {2}), ('1-3', {1, 2, 3}),
     ('*/2', range(0, 24, 2)), ('0,23', {0, 23}), ('1', {1})),
    (('*', range(60)), ('0', {0}), ('30', {30}), ('*/15', {0, 15, 30, 45}), ('29,59', {29, 59})),
    (('0', {0}), ('59', {59}), ('*/20', {0, 20, 40})),
    (('*', range(7)), ('*', range(7)), ('fri-sun', {4, 5, 6}), ('thu', {3}), ('mon-sat', range(6))))


def walk(low, high, zone):
    """Return (second, its wall time, wall times skipped right before it) for every second."""
    rows, before = [], datetime.datetime.fromtimestamp(low - 1, zone).replace(tzinfo=None)
    for second in range(low, high):
        wall = datetime.datetime.fromtimestamp(second, zone).replace(tzinfo=None)
        skipped = range(1, int((wall - before).total_seconds()))
        rows.append((second, wall, [before + datetime.timedelta(seconds=n) for n in skipped]))
        before = wall
    return rows


def due_by_hand(rows, numbers, every_hour):
    """Return the due ones of the seconds that walk() gave."""
    hours, minutes, seconds, weekdays = numbers
    return [second for second, wall, skipped in rows if any(
        each.second in seconds and each.minute in minutes and each.hour in hours and
        each.weekday() in weekdays for each in (
            (wall,) if every_hour else skipped if wall.fold else (*skipped, wall)))]


def some_part(rng, low, high, names=()):
    """Return a random part of a field, as APScheduler and croniter both read it."""
    first, last = sorted((rng.randint(low, high), rng.randint(low, high)))
    if names == 'day' and rng.random() < 0.7:
        return rng.choice(('last', f'{rng.choice(POSITIONS)} {rng.choice(WEEKDAYS)}'))
    if names and names != 'day' and rng.random() < 0.4:
        first, last = names[first - low], names[last - low]
        return rng.choice((first.upper(), f'{first}-{last}' if first != last else first))
    shapes = ['*', f'*/{rng.randint(1, high - low)}', str(first)]
    if first < last:                            # croniter: 5-5 is the whole cycle, ours is 5
        step = rng.randint(1, last - first)
        shapes += [f'{first}-{last}', f'{first}-{last}/{step}', f'{first}/{step}']
    return rng.choice(shapes)


def some_list(*args):
    return ','.join(some_part(*args) for _ in range(args[0].choice((1, 1, 1, 2, 3))))


def some_fields(rng):
    """Return random fields, NAME: text."""
    return {name: some_list(rng, *limits) for name, limits in (
        ('year', (2019, 2031)), ('month', (1, 12, MONTHS)), ('day', (1, 31, 'day')),
        ('week', (1, 53)), ('day_of_week', (0, 6, WEEKDAYS)), ('hour', (0, 23)),
        ('minute', (0, 59)), ('second', (0, 59)))
        if rng.random() < (0.1 if name in ('year', 'week') else 0.4)} or {'hour': '*/5'}


def spelled(fields):
    return ' '.join(f'"{name}={text}"' for name, text in fields.items())


def some_cron(rng):
    """Return five random cron fields."""
    sunday = rng.choice(('7', '5-7', 'sat-sun', 'mon-7', '0-7', '7/2,3', 'fri-sun/2'))
    texts = ['*' if rng.random() < 0.3 else some_list(rng, *limits) for limits in (
        (0, 59), (0, 23), (1, 31), (1, 12, MONTHS), (0, 6, WEEKDAYS[6:] + WEEKDAYS[:6]))]
    return texts[:4] + [sunday if rng.random() < 0.2 else texts[4]]


def some_moment(rng, name=None):
    """Return the Unix seconds of a time around a change of a zone, or around the end of a month."""
    if name:
        return rng.choice(ZONES[name][1:]) + rng.choice((60, 60, 5400)) * rng.randint(-300, 300)
    first = unix(f'{rng.randint(2020, 2028)}-{rng.randint(1, 12):02}-01')
    return int(first + 86400 * rng.choice((-2, -1, 0, rng.randint(0, 30))) +
               rng.choice((-60, -1, 0, rng.randint(0, 86399))))


def parsed(text):
    """Return a schedule, None if it can never fire."""
    schedule = parse_schedule(text)
    if schedule.next(0) is None:
        return None
    return schedule


class ScheduleCase(Case):
    def check_runs(self, text, start, expected):
        """Check the due times after a moment, as Unix seconds or as texts for unix()."""
        found = runs(parse_schedule(text), start, len(expected))
        with self.subTest(text=text, start=start):
            self.assertEqual(found, expected)

    def check_table(self, table):
        with local_time('UTC0'):
            for text, expected in sides(table):
                self.check_runs(text, unix(BASE), list(map(unix, expected.split())))

    def check_changes(self, name, way, table, suffix=''):
        change = ZONES[name][way]
        for text, expected in sides(table):
            self.check_runs(text + suffix, change - 7200,
                            [change + int(second) for second in expected.split()])


class ScheduleTest(ScheduleCase):
    @mock.patch.dict(sys.modules, croniter=None)    # the grammar never asks it
    def test_grammar_gives_times(self):
        self.check_table(GRAMMAR)

    @mock.patch.dict(sys.modules, croniter=None)
    def test_bad_schedules_are_refused(self):
        for text, words in sides(REFUSED):
            self.refused(words, parse_due, text)
        self.refused('is not understood; allowed are', parse_due, 'minute=*/' + '9' * 5000)

    def test_intervals_do_not_drift(self):
        for text, seconds in (
                ('every 15s', 15), ('15s', 15), ('15', 15), ('5m', 300), ('1h30m', 5400),
                ('2d', 172800), ('Every 1h 30m', 5400), ('every 0.1', 0.1), ('@every 5m', 300),
                ('@Every 1h30m', 5400), ('1h 30m', 5400), ('2d 4h', 187200), ('1.5 h', 5400)):
            with self.subTest(text=text):
                schedule = parse_schedule(text)
                self.assertEqual((schedule.elapsed, schedule.next(0)), (True, seconds))
                schedule.start = 1e9 + 0.3
                for number, due in enumerate(runs(schedule, schedule.start, 1000), 1):
                    self.assertAlmostEqual(due, schedule.start + number * seconds, 5)
                late = schedule.start + 2000.5 * seconds        # runs that were missed
                self.assertAlmostEqual(schedule.next(late), late + 0.5 * seconds, 5)

    def test_jitter_follows_every_spelling(self):
        for text in ('every 15s', '15s', 'minute=5', '*/5 * * * *', '@daily'):
            for spelling, jitter in ((text, 0), (text + ' jitter=1m', 60), ('jitter=2 ' + text, 2)):
                with self.subTest(text=spelling):
                    self.assertEqual(parse_schedule(spelling).jitter, jitter)

    @unittest.skipIf(NO_ZONES, NO_ZONES)
    def test_timezone_follows_every_spelling(self):
        for text in ('hour=0', '0 0 * * *', '@daily', 'jitter=1 @daily'):
            self.check_runs(text + ' timezone=Asia/Kolkata', unix(BASE), [unix('18:30')])
        self.refused("'15s timezone=Asia/Kolkata': an interval has no timezone", parse_schedule,
                     '15s timezone=Asia/Kolkata')
        for name in ('Foo/Bar', '', 'Europe', '../etc/passwd'):
            self.refused(f'timezone {name!r} is not known on this machine|Europe/Berlin',
                         parse_schedule, 'hour=2 timezone=' + name)

    @mock.patch.dict(sys.modules, zoneinfo=None)
    def test_local_time_needs_no_zoneinfo(self):
        self.refused("timezone 'Europe/Berlin' needs Python 3.9", parse_schedule,
                     'hour=2 timezone=Europe/Berlin')
        with local_time(ZONES['Europe/Berlin'][0]):
            self.check_runs('hour=2', unix(BASE), [unix('02-29T01:00')])

    def test_clock_changes_in_local_time(self):
        for name, way, table in CHANGES:
            with local_time(ZONES[name][0]):
                self.check_changes(name, way, table)

    @unittest.skipIf(NO_ZONES, NO_ZONES)
    def test_clock_changes_in_timezone(self):
        for name, way, table in CHANGES:
            self.check_changes(name, way, table, ' timezone=' + name)

    @unittest.skipIf(NO_ZONES, NO_ZONES)
    def test_skipped_day_runs_once(self):
        change = unix('2011-12-30T10:00')           # Apia went from the 29th to the 31st
        for text, expected in sides('''
                month=12 day=30 hour=12 >> 0
                0 12 * * * >> 0 43200
                day=30 >> 0
                hour=* >> 0 3600
                hour=* day=30 >> 2592000'''):
            self.check_runs(text + ' timezone=Pacific/Apia', change - 3600,
                            [change + int(second) for second in expected.split()])

    def check_every_second(self, name, zone, suffix):
        """Compare next() with a naive walk over every second around both changes."""
        rng = random.Random(name)
        for change in ZONES[name][1:]:
            low, high = change - 5400, change + 5400
            rows = walk(low, high, zone)
            for _ in range(12):
                texts, numbers = zip(*map(rng.choice, PARTS))
                text = 'hour={} minute={} second={} day_of_week={}'.format(*texts)
                schedule = parse_schedule(text + suffix)
                due = due_by_hand(rows, numbers, texts[0] == '*')
                moments = [change - 2, change - 1, change - 0.5, change, change + 1, low] + [
                    moment + rng.choice((0, -1, -0.5, 0.5))
                    for moment in rng.sample(due, min(20, len(due)))]
                for after in moments:
                    place = bisect.bisect_right(due, after)
                    found = min(schedule.next(after), high)
                    expected = due[place] if place < len(due) else high
                    self.assertEqual(found, expected, f'{text} next({change} {after - change:+}): '
                                     f'{found - change:+} is not {expected - change:+}')

    def test_every_second_in_local_time(self):
        for name, (rules, *_) in ZONES.items():
            with self.subTest(zone=name), local_time(rules):
                self.check_every_second(name, None, '')

    @unittest.skipIf(NO_ZONES, NO_ZONES)
    def test_every_second_in_timezone(self):
        for name in list(ZONES)[:3]:
            with self.subTest(zone=name):
                self.check_every_second(name, zoneinfo.ZoneInfo(name), ' timezone=' + name)


class CroniterTest(ScheduleCase):
    @unittest.skipUnless(croniter, 'croniter is not installed')
    def test_croniter_reads_the_rest(self):
        self.check_table(BEYOND)
        for text, words in sides('''
                0 0 * * fri#6 >> croniter refuses '0 0 * * fri#6':
                0 0 40L * * >> refuses
                a b c d e f >> croniter refuses 'a b c d e f':
                61 0 L * * >> refuses
                0 0 30 2 * 0 >> can never fire
                0 12 * * * 0 2020 >> no such date to come
                0 0 * * 1 0 x >> croniter refuses'''):
            self.refused(words, parse_due, text)
        with local_time(ZONES['Europe/Berlin'][0]):
            for way, once in (1, '0 84600'), (2, '-1800 88200'):
                self.check_changes('Europe/Berlin', way, f'''
                    30 2 * * * 0 >> {once}
                    30 * * * * 5 >> -5395 -1795 1805''')

    @mock.patch.dict(sys.modules, croniter=None)
    def test_missing_croniter_is_named(self):
        for text, _ in sides(BEYOND):
            self.refused(f'{text!r} needs croniter, which is not installed; without it cron',
                         parse_schedule, text)


class ScheduleOracleTest(Case):
    """Other programs' answers to random questions."""

    def setUp(self):
        self.enter(warnings.catch_warnings())
        warnings.simplefilter('ignore')                 # their deprecations

    @local_time('UTC0')
    def compare(self, question):
        """Ask torque and an oracle the same: in UTC, and in three zones around their changes.

        question(rng, zone) -> text, ask; ask(after) -> Unix seconds, None for never, `...`
        where the two differ on purpose.
        """
        rng, compared, differ, end = random.Random(27), 0, [], unix('2034-01-01')
        for name in (None,) if NO_ZONES else (None, *list(ZONES)[:3]):
            zone = zoneinfo.ZoneInfo(name) if name else datetime.timezone.utc
            for _ in range(100 if name else 450):
                text, ask = question(rng, zone)
                text += f' timezone={name}' if name else ''
                schedule = parsed(text)
                for after in [some_moment(rng, name) for _ in range(5)]:
                    ours, theirs = schedule and schedule.next(after), ask(after)
                    if theirs is not ...:
                        compared += 1
                        if min(ours or end, end) != min(theirs or end, end):
                            differ.append((text, after, ours, theirs))
        self.assertEqual(differ[:9], [])
        self.assertGreater(compared, 2000)

    @unittest.skipUnless(CronTrigger, 'apscheduler 3 is not installed')
    def test_fields_agree_with_apscheduler(self):
        def question(rng, zone):
            fields = some_fields(rng)
            trigger = CronTrigger(**fields, timezone=zone, end_date=datetime.datetime(2034, 1, 2))

            def ask(after):
                start = datetime.datetime.fromtimestamp(after + 1, zone)
                found = trigger.get_next_fire_time(None, start)
                # A clock change within a day, or on the way: it has rules of its own.
                offsets = {datetime.datetime.fromtimestamp(each.timestamp() + n, zone).utcoffset()
                           for each in (start, found or start) for n in (-86400, 86400)}
                return found and found.timestamp() if len(offsets) == 1 else ...
            return spelled(fields), ask
        self.compare(question)

    @unittest.skipIf(CRONITER < 7, 'croniter 7 is not installed; older ones misread e.g. 6/2')
    def test_cron_agrees_with_croniter(self):
        def question(rng, zone):
            minute, hour, *days = some_cron(rng)
            if zone is not datetime.timezone.utc:
                hour = rng.choice(('*', '*', '1-3', '2', '*/2', '0,1'))
                days = rng.choice((days, '***'))
            text = ' '.join((minute, hour, *days))
            oracle = croniter.croniter(text)
            # To cron(5) `*/2` restricts nothing, to croniter it does.
            differs = any('*' in part and part != '*' for part in (days[0], days[2]))

            def ask(after):
                if differs:
                    return ...
                found = datetime.datetime.fromtimestamp(after, zone)
                try:
                    found = oracle.get_next(datetime.datetime, found)
                    # Times that come twice: ours run the first time, unless the hour is `*`.
                    while found.fold and hour != '*':
                        found = oracle.get_next(datetime.datetime, found)
                except ValueError:                      # no such date
                    return None
                return found.timestamp()
            return text, ask
        self.compare(question)


# --- Scheduler -----------------------------------------------------------------------------------

class Clocks:
    """A wall clock and an elapsed clock that a test moves."""

    def __init__(self, wall=1700000000.0, elapsed=5000.0):
        self.now, self.up = wall, elapsed

    def wall(self):
        return self.now

    def elapsed(self):
        return self.up

    def pass_time(self, seconds):
        self.now += seconds
        self.up += seconds


class TickTest(Folder):
    """Due times, with clocks passed in; runs have real threads."""

    def setUp(self):
        super().setUp()
        self.clocks = Clocks(1700000000.0 - 1700000000 % 3600)       # on the hour
        self.scheduler = Scheduler(self.clocks.wall, self.clocks.elapsed)
        self.ran = []
        self.release = threading.Event()
        self.addCleanup(self.release.set)

    def add(self, text, name='job', run=None, **kwargs):
        return self.scheduler.add(Task(name, parse_schedule(text),
                                       run or (lambda: self.ran.append(name)), **kwargs))

    def idle(self):
        return not any(task.waiting or task.running_since
                       for task in self.scheduler.tasks.values())

    def tick(self, seconds=0.0):
        """Let time pass, and return the names of what has run then."""
        self.ran.clear()
        self.pass_time(seconds)
        wait_for(self.idle)
        return sorted(self.ran)

    def pass_time(self, *seconds):
        """Let time pass in steps, whatever runs."""
        for number in seconds:
            self.clocks.pass_time(number)
            self.sleep = self.scheduler.step()

    def test_intervals_begin_at_once_and_do_not_drift(self):
        task = self.add('every 10s')
        self.assertEqual([self.tick(), self.tick(9.9), self.tick(0.1)], [['job'], [], ['job']])
        for _ in range(100):
            self.assertEqual(self.tick(10.003), ['job'])
            self.clocks.pass_time(-0.003)
        self.assertEqual(task.due, 5000 + 102 * 10)
        self.assertAlmostEqual(self.scheduler.next_run(task), self.clocks.now + 10)

    def test_calendars_wait_for_their_date(self):
        task = self.add('minute=*/5')
        self.assertEqual([self.tick(), self.tick(299)], [[], []])
        self.assertAlmostEqual(self.sleep, 1)
        self.assertEqual(self.tick(1), ['job'])
        self.assertEqual((self.sleep, self.scheduler.next_run(task)),
                         (torque.MAX_SLEEP, self.clocks.now + 300))

    def test_suspend_makes_one_run(self):
        tasks = self.add('every 15s', 'a'), self.add('second=*/15', 'b')
        self.tick(1)
        self.assertEqual([self.tick(8 * 3600), self.tick()], [['a', 'b'], []])
        for task in tasks:
            self.assertGreater(task.missed, 900)
            self.assertTrue(self.logged(f'INFO {task.name}:', 'runs came due', 'merged into one'))
        self.assertEqual(self.tick(15), ['a', 'b'])

    def test_clock_forward_makes_one_run(self):
        interval, calendar = self.add('every 1h', 'a'), self.add('minute=0', 'b')
        self.tick(1)
        self.clocks.now += 86400                 # the wall clock alone
        self.assertEqual(self.tick(), ['b'])
        self.assertEqual((interval.missed, calendar.missed), (0, 23))
        self.assertEqual(self.tick(3599), ['a', 'b'])

    def test_clock_back_keeps_future_on_time(self):
        self.add('every 1m', 'a')
        self.add('minute=*', 'b')
        self.tick(60)
        self.clocks.now -= 86400
        self.assertEqual([self.tick(), self.tick(60)], [[], ['a', 'b']])
        self.assertTrue(self.logged('set back by 1d'))

    def test_small_step_back_repeats_nothing(self):
        self.add('minute=*', 'b')
        self.add('hour=* minute=0', 'c')
        self.assertEqual(self.tick(3600), ['b', 'c'])
        self.clocks.now -= 2
        self.assertEqual([self.tick(), self.tick(2.5), self.tick(60)], [[], [], ['b']])

    def test_wrong_future_is_forgotten(self):
        for text in ('minute=*', 'hour=3'):
            self.add(text, text)
        for steps in ((10 * 365 * 86400, -10 * 365 * 86400, -2), (86400, -86400 + 50, -45, -10)):
            for step in steps:
                self.tick(1)
                self.clocks.now += step
            self.tick(1)
            self.assertEqual(self.tick(60), ['minute=*'])
            self.assertIn('hour=3', self.tick(86400))

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
        task = self.add('every 1s', run=self.release.wait)
        self.pass_time(0)
        wait_for(lambda: task.running_since)
        self.pass_time(1, 1, 1)
        self.assertEqual(task.waiting, 3)
        self.release.set()
        wait_for(self.idle)
        self.assertEqual((task.missed, task.runs), (2, 2))
        self.assertTrue(self.logged('3 runs came due', 'merged into one'))

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
        task = self.add('every 1h', run=self.release.wait, max_runtime=30)
        self.pass_time(0)
        wait_for(self.scheduler.calls.qsize)
        self.pass_time(29)
        self.assertEqual(task.state, 'running')
        self.pass_time(1)
        self.assertEqual(task.state, 'overdue')
        self.assertTrue(self.logged('WARNING job:', 'still running after 30s'))

    def test_runs_in_time_leave_no_events(self):
        task = self.add('every 1s', max_runtime=300)
        for _ in range(100):
            self.tick(1)
        self.assertGreaterEqual(task.runs, 99)
        self.assertEqual((self.scheduler.calendar.queue, len(self.scheduler.intervals.queue)),
                         ([], 1))
        self.tick(8 * 3600)
        self.assertEqual((task.state, self.logged('still running')), ('idle', []))


class FailureLogTest(Folder):
    """What a failing job writes."""

    def setUp(self):
        super().setUp()
        self.task = Task('job', parse_schedule('every 1s'), lambda: None)
        self.enter(mock.patch('torque.elapsed_time', lambda: self.now))

    def fail(self, error, now):
        self.now = float(now)
        try:
            raise error
        except type(error) as raised:
            self.task.failed(raised)

    def told(self):
        return [line for line in self.lines if not line.startswith('DEBUG')]

    def test_same_failure_is_summed_up(self):
        for second in range(600):
            self.fail(LoggableError(f'no answer in {second}.5 s'), second)
        self.now = 600.0
        self.task.worked()
        self.assertEqual(self.told(), [
            'WARNING job: no answer in 0.5 s',
            'WARNING job: still failing, 61 times in 1m: no answer in 60.5 s',
            'WARNING job: still failing, 181 times in 3m: no answer in 180.5 s',
            'WARNING job: still failing, 421 times in 7m: no answer in 420.5 s',
            'INFO job: works again, after 600 failures in 10m'])
        self.assertEqual((self.task.failures, self.task.last_error), (600, None))

    def test_flapping_does_not_flood(self):
        for second in range(0, 600, 2):
            self.fail(LoggableError('refused'), second)
            self.task.worked()
        self.assertLess(len(self.told()), 25)
        self.fail(LoggableError('refused'), 9000)
        self.assertEqual(self.told()[-1], 'WARNING job: refused')

    def test_names_and_numbers_make_no_other_failure(self):
        for second in range(59):
            self.fail(LoggableError(f"'/tmp/{second:x}x' is no file"), second)
            self.fail(OSError(2, f'No {second:x}x'), second)
        self.assertEqual([len(self.logged(level)) for level in ('WARNING', 'ERROR')], [1, 1])
        self.fail(LoggableError('timed out'), 59)
        self.assertEqual(len(self.logged('WARNING')), 2)

    def test_bug_has_its_traceback_once(self):
        records = []
        self.task.log.addFilter(lambda record: records.append(record) or True)
        self.addCleanup(self.task.log.filters.clear)
        for second in range(90):
            self.fail(ZeroDivisionError('division by zero'), second)
        errors = [record for record in records if record.levelno == logging.ERROR]
        self.assertEqual([bool(record.exc_info) for record in errors], [True, False])
        self.assertIn('ZeroDivisionError: division by zero', errors[1].getMessage())

    def test_forked_children_end(self):
        for end, expected in ((lambda: None, 0), (sys.exit, 0), (lambda: sys.exit(3), 3),
                              (lambda: sys.exit("no"), 1), (lambda: 1 / 0, 1)):
            statuses = []

            def run(end=end, statuses=statuses):
                pid = os.fork()
                if pid:
                    statuses.append(os.WEXITSTATUS(os.waitpid(pid, 0)[1]))
                else:
                    end()
            self.task.run = run
            with self.subTest(end), warnings.catch_warnings():
                warnings.simplefilter('ignore')         # Python 3.12 warns of fork beside threads
                self.task.attempt()
                self.assertEqual((statuses, self.task.failures), ([expected], 0))

    def test_told_failure_is_not_repeated(self):
        error = Unreachable('gone')
        error.told = True
        self.fail(error, 0)
        self.task.worked()
        self.assertEqual(self.told(), [])


class WorkersTest(Folder):
    """The threads, with the real clock."""

    def setUp(self):
        super().setUp()
        self.scheduler = Scheduler()
        self.thread = threading.Thread(target=self.scheduler.serve, args=(lambda: None,),
                                       daemon=True)
        self.release = threading.Event()
        self.addCleanup(self.stop)

    def stop(self):
        self.release.set()
        self.scheduler.calls.put(self.scheduler.stop)
        self.thread.join(10)
        self.assertFalse(self.thread.is_alive())

    def add(self, name, run, text='every 0.1s'):
        return self.scheduler.add(Task(name, parse_schedule(text), run))

    def test_each_job_has_its_thread(self):
        names = {}
        for number in range(40):
            self.add(f'job{number}', lambda number=number: names.setdefault(
                number, set()).add(threading.get_ident()))
            self.add(f'hung{number}', self.release.wait)
        self.thread.start()
        wait_for(lambda: all(task.runs >= 5 for name, task in self.scheduler.tasks.items()
                             if name.startswith('job')))
        self.assertEqual([len(idents) for idents in names.values()], [1] * 40)
        self.assertEqual(len(self.scheduler.running()), 40)

    def test_refused_thread_is_tried_again(self):
        good = self.add('good', lambda: None)
        with mock.patch.object(threading.Thread, 'start', side_effect=RuntimeError('no more')):
            self.scheduler.step()
        self.thread.start()
        wait_for(lambda: good.runs >= 2)
        self.assertEqual(len(self.logged('ERROR scheduler:', 'no new worker thread: no more')), 1)
        self.assertGreaterEqual(good.missed, 5)

    def test_filters_of_logs_may_raise(self):
        bad = self.add('bad', mock.Mock(side_effect=LoggableError('x')))
        bad.log.addFilter(mock.Mock(side_effect=SystemExit))
        self.addCleanup(bad.log.filters.clear)
        self.thread.start()
        wait_for(lambda: bad.runs >= 3 and bad.failures >= 3)

    def test_calls_may_raise(self):
        good = self.add('good', lambda: None)
        self.thread.start()
        self.scheduler.calls.put(mock.Mock(side_effect=OSError(24, 'Too many open files')))
        wait_for(lambda: self.logged('ERROR scheduler: this should not happen'))
        runs = good.runs
        wait_for(lambda: good.runs > runs)

    def test_end_waits_for_runs(self):
        task = self.add('slow', self.release.wait, 'every 1h')
        self.thread.start()
        wait_for(lambda: task.running_since)
        self.scheduler.calls.put(self.scheduler.stop)
        self.thread.join(10)
        self.assertEqual(self.scheduler.finish(0.05), [task])
        self.release.set()
        self.assertEqual(self.scheduler.finish(30), [])
        self.assertEqual(task.runs, 1)


# --- RPC -----------------------------------------------------------------------------------------
# Doubles answer what a real rTorrent rarely would; LiveRpcTest, after Engine, asks real ones.

PIECES = ('', ' ', 'a', 'name', '&', '<', '>', ']]>', '"', "'", '&lt;', '&#65;', '\n', '\t', '\r',
          '\r\n', '%20', '?', '\x7f', '\x85', '\u2028', '\ufeff', '\xe9', '\u4e2d', '\U0001f600',
          '</string>', '<value>', '</value><value><i8>1', '<!--', '$d.name=', '\\')
NUMBERS = (0, 1, -1, 255, 2 ** 31 - 1, -2 ** 31, 2 ** 31, 2 ** 40, 2 ** 63 - 1, -2 ** 63)
PLAIN = (b'&<>]]>"\'', b'%20 %F0%9F %', b'what?', b'\xc3\xa9\xe4\xb8\xad', b'\x7f', b'\xc2\x85')
HOSTILE = (*PLAIN, b'\xf0\x9f\x98\x80 \xc3\xa9', b'a\tb', b'a\nb', b'a\rb', b'\r\n', b'>\r\n<',
           b'\xff', b'caf\xe9', b'\xc0\x80', b'\xe2\x82', b'\xed\xa0\x80', b'\xef\xbf\xbe',
           b'\x01\x08\x0b', b'\x1b[31m', b'\x0c\x1f', b'\xff\x01')
STYLES = ('\n', 'int'), ('\r\n', 'i4'), ('\r\n', 'i8'), ('', 'i8')  # Python, xmlrpc-c, tinyxml2
MISSING = (-506, -32601)                # the codes of `no such command`, by XML and by JSON
UNTRUSTED = xmlrpc.client.Fault(
    -503, 'Command "system.pid" is not allowed for untrusted connections.')


@mock.patch('xmlrpc.client.MAXINT', 2 ** 63)
@mock.patch('xmlrpc.client.MININT', -2 ** 63)
def xml_answer(value, gap='\n', number='int'):
    """Return a methodResponse in one of the STYLES: white space between tags, name of integers.

    An exception is a fault; \\udcff in text becomes the byte ff.
    """
    text = xmlrpc.client.dumps(value if isinstance(value, Exception) else (value,), None, True,
                               None, True)
    if gap != '\n':
        text = re.sub('(<(?:param|member)>)\n|\n(?=</(?:param|member)>)', r'\1', text)
        text = text.replace('>\n<', f'>{gap}<').replace('<data></data>', '<data/>')
    return text.replace('int>', f'{number}>').encode('utf-8', 'surrogateescape')


def as_text(value):
    """Return a value of xmlrpc.client with text in the place of bytes, as torque has it."""
    if isinstance(value, list):
        return [as_text(item) for item in value]
    if isinstance(value, dict):
        return {name: as_text(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return re.sub('\r\n?', '\n', value.decode('utf-8', 'replace'))
    return value


def some_value(rng, depth=3):
    """Return a random value: hostile text, numbers, rows of them, anything in lists and dicts."""
    kind = rng.randrange(6 if depth else 4)
    text = ''.join(rng.choices(PIECES, k=rng.randrange(4)))
    if kind < 4:
        return (text, text.encode(), rng.choice(NUMBERS), rng.random() < 0.5)[kind]
    items = [some_value(rng, depth - 1) for _ in range(rng.randrange(5))]
    return {rng.choice(PIECES): item for item in items} if kind == 5 else items


def damaged(rng, content):
    """Return bytes to which something happened on the way."""
    start, end = sorted(rng.choices(range(len(content)), k=2))
    extra = rng.choice((b'', b'<', b'>', b'&', b'\0', b'</value>', b'<fault>', b'{', b'9' * 5000))
    return rng.choice((content[:start], content[end:], content[:start] + extra + content[end:]))


class RpcCase(Folder):
    """A test case with doubles of rTorrent."""

    def fails(self, words, function, *params, kind=RpcError, **options):
        return super().fails(words, function, *params, kind=kind, **options)

    def assert_trouble(self, words, engine, kind=RpcError):
        """Ask; the error has to name the address, and no command that nobody has asked for."""
        error = self.fails(f'{engine.address.where}: |{words}', engine.reach, kind=kind)
        self.assertNotIn('system.listMethods', str(error))
        return error

    def value_or_error(self, function, *params):
        """Call; any value and any RpcError of one line will do."""
        with self.subTest(params=str(params)[:300]):
            try:
                function(*params)
            except RpcError as error:
                self.assertNotIn('\n', str(error))

    def serve(self, answer, name=None):
        """Start a double, on a Unix socket in the folder if that gets a name."""
        return self.ended(Server(answer, name and self.path(name)))

    def start(self, name='rpc.sock', speaks_json=False, **commands):
        """Start a double that has commands, and return an Engine for it."""
        self.double = Commands(speaks_json, **commands)
        self.server = self.serve(self.double.scgi, name)
        return Engine(self.server.url, 9)


# what scgi_url says >> host, port or path, user, password
ADDRESSES = '''
scgi://localhost:5000 >> localhost 5000
127.0.0.1:5000 >> 127.0.0.1 5000
scgi://:5000 >> 127.0.0.1 5000
scgi://0.0.0.0:5000/ >> 127.0.0.1 5000
seed:$PORT >> seed 81
scgi://[::1]:5000 >> ::1 5000
scgi:///run/x.sock >> /run/x.sock
/a b#?:1.sock >> /a b#?:1.sock
~/x.sock >> /home/me/x.sock
scgi://~/x.sock >> /home/me/x.sock
$DIR/x.sock >> /d/x.sock
scgi://${DIR}/x.sock >> /d/x.sock
http://host >> http://host/RPC2
https://me@host:444/x >> https://host:444/x me
http://me:p%40ss:$PORT@host/ >> http://host/ me p@ss:81
'''


class AddressTest(RpcCase):
    @mock.patch.dict(os.environ, PORT='81', DIR='/d', HOME='/home/me')
    def test_spellings_are_understood(self):
        for line in ADDRESSES.strip().splitlines():
            text, expected = line.split(' >> ')
            with self.subTest(text):
                found = parse_address(f' {text} ')
                parts = {'tcp': f'{found.host} {found.port}', 'unix': found.path,
                         'http': ' '.join([found.path, *found.login]).strip()}
                self.assertEqual(parts[found.kind], expected)
                self.assertEqual(parse_address(found.where).where, found.where)
                self.assertEqual(parse_address(found.where)[:5], found[:5])
                self.assertEqual(found.exposed, found.kind == 'tcp' and not re.search(
                    r'localhost|127\.|\[::1\]', text), text)

    def test_other_text_is_refused(self):
        for text in '''
                scgi://| rpc.sock| localhost| scgi://localhost| 5000| http://| ftp://host:1|
                scgi://host:port| scgi://host:99999| unix:///rt.sock| scgi://host:5000/RPC2|
                scgi:/rt.sock| http://[::1/RPC2| /x\0y| ftp://me:s3cret@host|
                http://me:s3cret#1@host/| http://me:s3cret/1@host/| http://me:s3cret?1@host/|
                ftp://me:my s3cret@host/| me:s3cret@host/RPC2| http://me:s3cret@[host/|
                http://me:@s3cret@host:x/| http://:s3cret@a:x/'''.split('|'):
            error = self.refused('allowed are|scgi://host:port|http(s)://', parse_address, text)
            self.assertNotIn('s3cret', f'{error} {error!r}')


class XmlTest(RpcCase):
    def assert_as_python(self, content):
        with self.subTest(content=content):
            expected = as_text(xmlrpc.client.loads(content, use_builtin_types=True)[0][0])
            self.assertEqual(repr(xml_reply(content)), repr(expected))   # True is not 1

    def test_reads_what_python_reads(self):
        rng = random.Random(1)
        values = ['', 0, -2 ** 63, True, b'', b'caf\xe9', [], {}, [[]], [{}], [[[7]]], [1, 'a', []],
                  [[1, 'a'], [2, '']], {'a': [], 'b': {'c': 1}}, [['<', '\r\n']]]
        values += [some_value(rng) for _ in range(1500)]
        for value in values:
            for style in (*STYLES, ('\n', 'ex:i8')):
                self.assert_as_python(xml_answer(value, *style))
        for inner in (b'<string/>', b'<struct/>', b'<array><data/></array>'):
            self.assert_as_python(xml_answer(1, '').replace(b'<int>1</int>', inner))

    def test_damage_gives_one_line(self):
        rng, one = random.Random(2), xml_answer(1, '')
        for number in range(2000):
            value = (some_value(rng), UNTRUSTED, [['a', 1]] * 3)[number % 3]
            content = xml_answer(value, *rng.choice(STYLES))
            self.value_or_error(xml_reply, damaged(rng, content))
        bodies = [one.replace(b'<int>1</int>', inner) for inner in (
            b'<int>one</int>', b'<int></int>', b'<int>%s</int>' % (b'9' * 5000), b'bare', b'<nil/>',
            b'<double>1.5</double>', b'<struct><member><value>1</value></member></struct>')]
        for content in (b'', b' ', b'\0', b'0', b'<html>', one + one, one[:-9], one.replace(
                b'<methodR', b'<!DOCTYPE x [<!ENTITY a "aaaa">]><methodR', 1), *bodies):
            self.fails('not XML-RPC', xml_reply, content)
        for fault in (b'<int>5</int>', b'<array><data/></array>', b'<struct/>'):
            self.fails('', xml_reply, b'<methodResponse><fault><value>' + fault
                       + b'</value></fault></methodResponse>')

    def test_requests_carry_every_value(self):
        values = ['', ' & <b> ]]> "\'', '\xe9\n\t', *NUMBERS[:6], b'\0\xff', [], ['a', [{}]],
                  {'k': 1, 'a&<b': [b'x']}, '%20 $d.name=']
        calls = [('d.x', *values), ('m', 2 ** 31, True, (1, False), '/\udcff', '\U0001f600', 'a\r')]
        content = xml_batch(calls)
        self.assertNotIn(b'<boolean', content)          # which older rTorrents refuse
        (found,), method = xmlrpc.client.loads(content, use_builtin_types=True)
        self.assertEqual((method, found), ('system.multicall', [
            {'methodName': 'd.x', 'params': values}, {'methodName': 'm', 'params': [
                str(2 ** 31), 1, [1, 0], b'/\xff', b'\xf0\x9f\x98\x80', b'a\r']}]))


class Commands:
    """The commands of an rTorrent that is none; `seen` has (codec, methods) of each request."""

    def __init__(self, speaks_json=False, **commands):
        self.seen = []
        self.commands = {
            'system.listMethods': lambda *params: list(self.commands), 'session.name': 'double:1',
            'session.path': '/s/', 'system.client_version': '0.9.8', 'system.pid': 1 << 30,
            'system.library_version': '0.13.8', 'view.size': 0, **commands}
        if speaks_json:
            self.commands['network.rpc.use_jsonrpc'] = 1

    def values(self, codec, calls):
        self.seen.append((codec, [method for method, _ in calls]))
        none = xmlrpc.client.Fault(MISSING[codec == 'json'], 'none')
        found = [(self.commands.get(method, none), params) for method, params in calls]
        return [value(*params) if callable(value) else value for value, params in found]

    def answer(self, body):
        """Return the body of the answer to a request."""
        if body[:1] == b'[':
            values = self.values('json', [(call['method'], call['params'])
                                          for call in json.loads(body.decode())])
            if '\\udcff' in repr(values):
                return b'{"error":{"code":-32700,"message":"type_error.316"},"id":null}'
            return json.dumps([
                {'error': {'code': value.faultCode}} if isinstance(value, Exception)
                else {'result': value} for value in values]).encode()
        params, method = xmlrpc.client.loads(body, True)
        if method != 'system.multicall':
            return xml_answer(self.values('xml', [(method, params)])[0])
        return xml_answer([vars(value) if isinstance(value, Exception) else [value] for value in
                           self.values('xml', [tuple(call.values()) for call in params[0]])])

    def scgi(self, connection):
        connection.sendall(scgi_answer(self.answer(Server.request(connection))))

    def asked(self, method):
        """Return by which codecs this was asked, in order."""
        return [codec for codec, methods in self.seen if method in methods]


class JsonTest(RpcCase):
    def test_batches_keep_order(self):
        engine = self.start(None, True, **{'d.name': str.lower})
        calls = [('d.name', 'A'), ('nosuch', ''), ('d.name', 'B'), ('system.pid', '')]
        for codec, door in ('json', engine.ask), ('xml', engine.tell):
            name, error, *rest = door(calls)
            self.assertEqual(self.double.seen[-1], (codec, [call[0] for call in calls]))
            self.assertEqual((name, error.code, rest),
                             ('a', MISSING[codec == 'json'], ['b', 1 << 30]))
            self.assertEqual(str(error).partition(' fault')[0],
                             f'{engine.address.where}: nosuch:')
            self.assertEqual(door([('d.name', f'N{number}') for number in range(1234)]),
                             [f'n{number}' for number in range(1234)])
            self.assertEqual(door([]), [])

    def test_lost_answers_are_asked_again(self):
        engine = self.start(None, True, **{'d.hash': 'A', 'd.name': '\udcff'})
        answers = engine.ask([('d.name', 'A'), ('d.nosuch', ''), ('d.hash', 'A')])
        self.assertEqual((answers[::2], answers[1].code), (['\ufffd', 'A'], -506))
        self.assertEqual(engine.ask([('d.hash', 'A')]), ['A'])
        self.assertEqual(self.double.asked('d.hash'), ['json', 'xml', 'json'])
        for content in ('', '<html>', '5', 'null', '[5', '[null, 1]', '{}', '[]', '[' * 99999,
                        '{"error":5}', '{"error":null}', '9' * 9999):
            def answer(connection, content=content):
                body = Server.request(connection)
                connection.sendall(scgi_answer(
                    content if body[:1] == b'[' else self.double.answer(body)))
            self.server.answer = answer
            with self.subTest(content[:20]):
                self.assertEqual(engine.ask([('d.hash', 'A')]), ['A'])

    def test_changes_are_never_repeated(self):
        engine = self.start(None, True, **{'d.start': '\udcff'})
        self.assertEqual(engine.tell([('d.start', 'A')]), ['\ufffd'])
        self.assertEqual(self.double.asked('d.start'), ['xml'])
        self.server.answer = Server.request             # takes it, and does not answer
        self.fails('d.start: |without an answer', engine.tell, [('d.start', 'A')])

    def test_any_sendable_parameter_goes(self):
        engine = self.start(None, True, echo=lambda target, value: value)
        for value in ([1, ['a']], {'a': [2]}, [], 2 ** 53 + 1, -2 ** 40, '\x01\U0001f600"\\'):
            self.assertEqual(engine.ask([('echo', '', value)]), [value])
        for value, door in ((object(), engine.ask), ([{1}], engine.ask), ([None], engine.tell),
                            (1.5, engine.tell)):
            self.fails('cannot be sent', door, [('echo', '', value)], kind=TypeError)


class ProxyTest(RpcCase):
    """What jobs that people write get from engine.open()."""

    def test_it_is_a_server_proxy(self):
        engine = self.start(None, True, echo=lambda target, *values: list(values), **{
            'd.name': xmlrpc.client.Fault(-501, 'Could not find info-hash.')})
        proxy = engine.open()
        self.assertIsInstance(proxy, xmlrpc.client.ServerProxy)
        self.assertEqual(self.double.seen, [])          # nothing is asked before the first call
        with proxy:
            self.assertEqual(proxy.echo('', 'a&b\1\udcff', 7, [True], -2 ** 40, {'a': 2 ** 31}),
                             ['a&b\1\ufffd', 7, [1], str(-2 ** 40), {'a': str(2 ** 31)}])
        self.assertEqual(self.double.seen[1:], [('xml', ['echo'])])
        for method, code, kind in (('d.name', -501, HashNotFound),
                                   ('no.such', -506, RpcError)):
            error = self.fails(f'{engine.address.where}: {method}: |{code}',
                               getattr(proxy, method), kind=kind)
            self.assertEqual(error.code, code)

    def test_many_calls_at_once(self):
        engine = self.start(None, **{'d.name': str.lower})
        many = xmlrpc.client.MultiCall(engine.open())
        many.d.name('A')
        many.system.pid('')
        self.assertEqual(list(many()), ['a', 1 << 30])
        self.assertEqual(self.double.seen[1:], [('xml', ['d.name', 'system.pid'])])
        many.no.such('')
        with self.assertRaises(xmlrpc.client.Fault):
            list(many())


GOOD = scgi_answer(xml_answer([], *STYLES[1]))
HTML = b'<html><body>It works!</body></html>'


def plays(start, slowly=b'', flood=0, silent=False):
    """Return a double that sends this, more byte by byte, that many MiB; then closes or waits."""
    def answer(connection):
        connection.sendall(start)
        for byte in slowly:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
        for _ in range(flood):
            connection.sendall(bytes(1 << 20))
        while silent and connection.recv(65536):
            pass
    return answer


def digest_is_right(head, password):
    """Tell whether a request answers the challenge of test_http_logins (RFC 7616)."""
    fields = dict(re.findall(r'(\w+)="?([^",\r]*)', head.partition('Authorization: ')[2]))

    def md5(*parts):
        return hashlib.md5(':'.join(parts).encode()).hexdigest()
    return 'uri' in fields and fields['response'] == md5(
        md5('me', 'rt', password), 'n0nce', fields['nc'], fields['cnonce'], 'auth',
        md5('POST', fields['uri']))


class TransportTest(RpcCase):
    def test_scgi_trouble_is_one_line(self):
        head, size = b'Status: 200 OK\r\nContent-Length: ', len(GOOD)
        for words, *answer in (
                ('closed without an answer', b''), ('not one of rTorrent|200 OK', GOOD[:20]),
                (f'broke off after {size - 20} bytes', GOOD[:-20]),
                ('connected, but no answer in 0.3 s|; scgi:// is for', b'', b'', 0, True),
                (f'only {size - 20} bytes came in 0.3 s', GOOD[:-20], b'', 0, True),
                ('bytes came in 0.3 s', GOOD[:9], GOOD[9:]),
                ('64.0 MiB, the limit', head + b'99\r\n\r\n', b'', 300),
                ('not one of rTorrent', head + b'-5\r\n\r\n12345'),
                ('not one of rTorrent|methodResponse', xml_answer([])),
                ('not one of rTorrent|HTTP/1.1 502 Bad', page(HTML, '502 Bad')),
                ('not XML-RPC|<html>', scgi_answer(HTML)), ('not XML-RPC', scgi_answer(b'')),
                ('untrusted|web server', scgi_answer(xml_answer(UNTRUSTED)))):
            double = plays(*answer)
            server = self.serve(lambda connection, double=double: (
                Server.request(connection), double(connection)))
            self.assert_trouble(words, Engine(server.url, 0.3 if '0.3' in words else 9))
        self.assert_trouble('connection', Engine(self.serve(lambda connection: None).url, 9))

    def test_http_trouble_is_one_line(self):
        head, good = b'HTTP/1.1 200 OK\r\n', page(xml_answer([]))
        chunked = head + b'Transfer-Encoding: chunked\r\n\r\n'
        for words, *answer in (
                ('without an answer', b''), ('20 more expected', good[:-20]),
                ('0.3 s', b'', b'', 0, True), ('0.3 s', good[:9], good[9:]),
                ('IncompleteRead', chunked + b'ff\r\nabc'), ('', chunked + b'zz\r\n'),
                ('1.0 MiB, the limit', head + b'\r\n', b'', 300),
                ('no usable answer|what?', b'what?\r\n\r\n'),
                ('HTTP 200|<html>', page(HTML, header='Content-Type: text/html')),
                ('HTTP 302 Found', page(b'', '302 Found', 'Location: /x')),
                ('HTTP 401', page(HTML, '401 No', 'WWW-Authenticate: Negotiate')),
                ('not XML-RPC', page(xml_answer([])[:-9])),
                ('untrusted', page(xml_answer(UNTRUSTED), '500 No', 'Content-Type: text/html'))):
            double, seconds = plays(*answer), 0.3 if '0.3' in words else 9
            server = self.ended(WebServer(lambda connection, *_, double=double: double(connection)))
            self.assert_trouble(words, Engine(server.url + '/RPC2', seconds, 1 << 20))
            self.assertEqual(len(server.requests), 1)

    def test_http_logins(self):
        double, digest = Commands(), 'Digest realm="rt", nonce="n0nce", qop="auth", algorithm=MD5'
        for challenge in ('Basic realm="rt"', digest, 'Negotiate'):
            def answer(connection, head, body, challenge=challenge):
                right = (digest_is_right(head, 'p@ss') if challenge is digest else
                         'Basic bWU6cEBzcw==' in head)
                connection.sendall(page(double.answer(body)) if right else
                                   page(b'no', '401 No', f'WWW-Authenticate: {challenge}'))
            url = self.ended(WebServer(answer)).url + '/RPC2'
            if challenge != 'Negotiate':
                engine = Engine(url.replace('://', '://me:p%40ss@'), 9)
                self.assertEqual(engine.ask([('system.pid', '')]), [1 << 30])
            for login in ('me:wr0ng@', 'me@', ''):
                engine = Engine(url.replace('://', f'://{login}'), 9)
                error = self.assert_trouble('', engine)
                self.assertRegex(str(error), 'HTTP 401|Negotiate|digest auth failed')
                self.assertNotIn('wr0ng', f'{error!r} {engine!r} {self.lines}')

    def test_other_servers_are_named_at_once(self):
        web = http.server.HTTPServer(('127.0.0.1', 0), http.server.BaseHTTPRequestHandler)
        self.addCleanup(web.server_close)
        self.addCleanup(web.shutdown)
        threading.Thread(target=web.serve_forever, daemon=True).start()
        greeter = self.serve(plays(b'SSH-2.0-OpenSSH_9.2p1\r\n', silent=True))
        closes = self.serve(lambda connection: connection.recv(65536))
        self.enter(mock.patch('sys.stderr', io.StringIO()))
        for url, words in ((f'scgi://127.0.0.1:{web.server_port}', 'not one of rTorrent|HTML'),
                           (greeter.url, 'not one of rTorrent: |SSH-2.0-OpenSSH'),
                           (closes.url.replace('scgi', 'http'), 'the connection was closed')):
            began = time.monotonic()
            self.assert_trouble(
                f'{words}|; scgi:// is for the port of rTorrent itself, http:// for a web',
                Engine(url, 20), Unreachable)
            self.assertLess(time.monotonic() - began, 5)

    def test_missing_servers_are_named(self):
        stale = self.path('stale.sock')
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(stale)
        for url, word in ((f'scgi://127.0.0.1:{free_port()}', 'nobody listens'),
                          (f'http://127.0.0.1:{free_port()}', 'nobody listens'),
                          (self.write('file', ''), 'this is no socket; scgi_url is what'),
                          (self.folder, 'this is no socket'), (stale, 'nobody listens'),
                          ('/no/such.sock', 'no such socket'), ('/' + 'x' * 200, 'too long'),
                          ('scgi://no.such.invalid:5000', 'cannot be resolved')):
            self.assert_trouble(word, Engine(url, 9), Unreachable)

    def test_oversized_requests_are_named(self):
        answers = iter([Commands().scgi, lambda connection: connection.recv(1)])
        server = self.serve(lambda connection: next(answers)(connection))
        engine = Engine(server.url, 9)
        self.fails('load.raw: |request|too large', engine.tell, [('load.raw', '', bytes(8 << 20))])


# --- Engine --------------------------------------------------------------------------------------
# The rc of rTorrent's wiki; and rcs, with | for the end of a line, >> what scgi_url they give
WIKI = '''method.insert = cfg.basedir, private|const|string, (cat,"/x/")
    method.insert = cfg.session, private|const|string, (cat,(cfg.basedir),"s/")
    method.insert = cfg.log, private|const|string, (cat,(cfg.basedir),(system.time),".log")
    session.path.set = (cat, (cfg.session))\nnetwork.scgi.open_local ='''
RC_SPELLINGS = r'''
WIKI /x/rpc.sock >> /x/rpc.sock
WIKI "/x/a b.sock" >> /x/a b.sock
WIKI ~/rpc.sock >> HOME/rpc.sock
WIKI \ |   /x/rpc.sock >> /x/rpc.sock
WIKI (cat,(session.path),rpc.sock) >> /x/s/rpc.sock
WIKI (cat, (session.path), "../rpc.sock") >> /x/s/../rpc.sock
WIKI (cat, \ | (cfg.basedir), \ | rpc.sock) >> /x/rpc.sock
WIKI (cat,(system.env,HOME),/rpc.sock) >> HOME/rpc.sock
WIKI (cat,(fs.homedir),/rpc.sock) >> HOME/rpc.sock
method.insert = cfg.home, private|const|string, (fs.homedir) | scgi_local = (cfg.home)/x >> HOME/x
import = (cat,(fs.homedir),/more/common.rc) >> /x/common.sock
WIKI /x/rpc.sock ; print = "x ; y" >> /x/rpc.sock
network.scgi.open_local=/x/rpc.sock >> /x/rpc.sock
scgi_local = /x/rpc.sock >> /x/rpc.sock
scgi_local = (cat,(session.path),x) | session = ~/s >> HOME/s/x
# scgi_local = /old |  #scgi_local = /old | print = "a ; b" ; scgi_local = /x/new >> /x/new
schedule2 = x,0,0,"execute.nothrow=chmod,770,/x" | scgi_local = /x/rpc.sock >> /x/rpc.sock
network.scgi.open_port = 127.0.0.1:5000 >> 127.0.0.1:5000
network.scgi.open_port = "127.0.0.1:5000" >> 127.0.0.1:5000
scgi_port = localhost:5000 >> localhost:5000
scgi_port = :5000 >> :5000
scgi_port = (cat,"127.0.0.1:",5000) >> 127.0.0.1:5000
import = more/common.rc >> /x/common.sock
import = loop.rc >> /x/loop.sock
try_import = ~/more/common.rc >> /x/common.sock
import = (cat,(system.env,HOME),/more/common.rc) >> /x/common.sock
try_import = /no/such.rc | scgi_local = /x/rpc.sock >> /x/rpc.sock
method.insert = my.dir, private|const|string, HOME/more/ | import = more/outer.rc >> /x/common.sock
import = more/common.rc | network.scgi.open_local = (cat,(session.path),x) >> /deep/x
'''


class EngineTest(RpcCase):
    def stop(self):
        self.server.end()
        os.remove(self.server.url)

    def looks(self):
        return len(self.double.asked('system.listMethods'))

    def test_looks_again_when_that_may_tell_more(self):
        engine = self.start()
        for _ in range(3):
            engine.ask([('session.name', '')])
        self.assertEqual((self.looks(), len(self.double.seen)), (1, 4))
        self.assertEqual((engine.engine_id, engine.version), ('double:1', '0.9.8/0.13.8'))
        self.assertIn('view.size', engine.methods)
        self.assertEqual((engine.ask([('nosuch', '')])[0].code, self.looks()), (-506, 1))
        engine.reach()
        self.assertEqual(self.looks(), 2)
        self.stop()
        self.start(**{'session.name': 'double:2'})
        self.assertEqual(engine.stats().engine_id, 'double:2')

    def test_looks_at_a_port_each_minute(self):
        engine = self.start(None)
        engine.reach()
        self.double.commands['session.name'] = 'double:2'
        for minutes, name in (0, 'double:1'), (1, 'double:2'):
            now = torque.elapsed_time() + minutes * 60
            with mock.patch('torque.elapsed_time', lambda now=now: now):
                self.assertEqual(engine.stats().engine_id, name)

    def test_stats_are_one_question(self):
        no = xmlrpc.client.Fault(-503, 'No')
        rates = [f'throttle.global_{way}.{what}' for way in ('up', 'down')
                 for what in ('rate', 'max_rate', 'total')]
        engine = self.start(**{
            **dict(zip(rates, range(6))), 'network.max_open_files': 128, 'network.open_sockets': no,
            'view.size': lambda target, view: len(view) if view != 'messages' else no})
        engine.reach()
        del self.double.seen[:]
        stats = engine.stats()
        self.assertEqual(len(self.double.seen), 1)
        self.assertEqual(stats[3:13], (0, 1, 2, 3, 4, 5, None, None, None, 128))
        self.assertEqual((stats.views['main'], stats.views['messages']), (4, None))
        self.assertEqual(stats[:3], ('double:1', '0.9.8/0.13.8', None))
        engine = self.start(None, startup_time=int(time.time()) - 5000)
        self.assertEqual(engine.stats().uptime // 100, 50)

    def test_says_once_that_it_is_gone_and_back(self):
        engine = self.start()
        where = engine.address.where
        for times in range(3):
            for _ in range(3):
                engine.stats()
            self.assertEqual(len(self.logged('INFO engine', where, 'answers again')), times)
            self.stop()
            for _ in range(3):
                error = self.fails(where, engine.stats, kind=Unreachable)
                self.assertTrue(error.told)
            self.assertEqual(len(self.logged('WARNING engine', where, 'not running?')), times + 1)
            self.start()
        engine.reach()
        self.assertFalse(self.fails('nosuch', engine.open().nosuch, '').told)
        self.assertEqual(len(self.lines), 6, self.lines)

    def test_odd_answers_give_one_line(self):
        rng, names = random.Random(4), (*torque.ABOUT, *torque.GAUGES.values(), 'view.size')
        for number in range(200):
            odd = {name: as_text(some_value(rng)) for name in names if rng.random() < 0.5}
            if number % 10:
                odd.pop('system.listMethods', None)
            engine = self.start(None, **odd)
            self.value_or_error(engine.stats)
            self.assertIsInstance(engine.session_path, str)
        deep = '<value><array><data>', '</data></array></value>'
        bodies = [xml_answer(odd) for odd in (0, [], [0], [[]], ['x'], [{}], [None])]
        bodies += [xml_answer(1, '').replace(b'<value><int>1</int></value>', (
            deep[0] * depth + deep[1] * depth).encode()) for depth in (10, 900, 1000, 50000)]
        for body in bodies:
            self.server.answer = plays(scgi_answer(body))
            self.value_or_error(lambda: repr(engine.tell([('d.name', 'A')])))

    def test_answers_are_read_in_little_memory(self):
        row, text = ['A' * 40, 'name', 300, 2 ** 33, 1, '/srv/data/name', ''], 'x' * 2000000
        engine = self.start()
        engine.reach()
        for by_json, value in (
                (False, [row] * 9000), (True, [row] * 9000), (False, [['A' * 40]] * 30000),
                (True, [['A' * 40]] * 30000), (False, [[300]] * 30000), (False, text), (True, text),
                (False, '&"' * 300000), (False, [['n\U0001f600me', *row]] * 9000)):
            content = xml_answer([[value]], *STYLES[1])
            if by_json:
                content = json.dumps([{'result': value}]).encode()
            engine.speaks_json = by_json
            engine.send = lambda *_, content=content: bytearray(content)
            with self.subTest(by_json=by_json, value=str(value)[:60]):
                tracemalloc.start()
                self.addCleanup(tracemalloc.stop)
                self.assertEqual(engine.ask([('x', '')]), [value])
                self.assertLess(tracemalloc.get_traced_memory()[1] / len(content), 6)
                tracemalloc.stop()
        for content in b'[%s]' % b','.join([b'[]'] * 99999), b'["%s"]' % (b'\xc3' * 99999):
            self.fails('memory|rpc_limit', torque.json_text, content, len(content))

    def test_rc_spellings(self):
        self.write('more/common.rc', 'scgi_local = /x/common.sock\nimport = deeper.rc\n')
        self.write('more/deeper.rc', 'session.path.set = /deep\n')
        self.write('more/outer.rc', 'import = (cat,(my.dir),common.rc)\n')
        self.write('loop.rc', 'import = ./loop.rc\n' * 9 + 'scgi_local = /x/loop.sock\n')
        for line in RC_SPELLINGS.strip().splitlines():
            text, expected = line.replace('HOME/', self.folder + '/').split(' >> ')
            text = text.replace('WIKI', WIKI).replace(' | ', '\n')
            with self.subTest(text), mock.patch.dict(os.environ, HOME=self.folder):
                found = find_url(self.write('rt.rc', b'# caf\xe9\n' + text.encode()))
                self.assertEqual(parse_address(found), parse_address(expected))

    def test_unclear_rc_files_are_named(self):
        local, path = 'network.scgi.open_local', self.path('rt.rc')
        line = f'{local} = (cat,(session.path),rpc.socket)'
        plain = f"{local} = {os.path.expanduser('~')}/rpc.socket"
        for text, words in sides(f'''
                session.path.set = /s >> {path} opens no SCGI socket|start rTorrent anew: {line}
                >> {path} opens no SCGI socket|start rTorrent anew: {plain}
                #{local} = /x >> opens no|{plain}
                schedule2 = x,1,0,"{local}=/x" >> opens no|{plain}
                # a\\| b| | import = /no/such.rc >> {path}:4: /no/such.rc: No such file
                | {local} = (cat,(execute.capture,echo,-n,/x),/rpc.sock) >> rt.rc:2|execute.ca
                {line} >> rt.rc:1: torque cannot tell what '(cat,(session.path),rpc.socket)' comes
                # x| |   {local} = rpc.sock >> rt.rc:3: |'rpc.sock' comes to; write the whole
                print = a ; {local} = ./session/rpc.sock >> rt.rc:1: |'./session/rpc.sock'
                print = \\|  a| {local} = x.sock >> rt.rc:3:
                session = s| scgi_local = (cat,(session.path),x) >> rt.rc:2: |session.path
                {local} = "$cat=$session.path=,rpc.socket" >> rt.rc:1: |$cat=$session.path=
                network.scgi.open_port = 5000 >> rt.rc:1: |'5000'
                {local} = (a)| method.insert = a, string, (a) >> rt.rc:1: |'(a)'
                import = / >> rt.rc:1: /: Is a directory
                import = /x\0y >> null'''):
            text = self.write('rt.rc', text.replace('| ', '\n'))
            self.refused(f'{words}|set scgi_url', find_url, text)
        with mock.patch.dict(os.environ, HOME=self.folder):
            names = '/.config/rtorrent/rtorrent.rc', '/.rtorrent.rc', '/no.rc'
            for name, words in (None, '|'.join(names[:2])), (names[2], names[2]):
                self.refused(f'scgi_url|{words}', find_url, name)
            self.write(names[1][1:], 'scgi_local = /x/second.sock')
            self.assertEqual(find_url(None), 'scgi:///x/second.sock')
            self.write(names[0][1:], 'scgi_port = 127.0.0.1:5000')
            self.assertEqual(find_url(None), 'scgi://127.0.0.1:5000')


def on_each(test):
    """Return a test method that runs test(self, server, proxy) for every rTorrent."""
    def run(self):
        for server in self.servers:
            with self.subTest(command=server.process.args[0], url=server.url):
                test(self, server, server.engine.open())
    return run


class LiveRpcTest(RpcCase):
    @classmethod
    def setUpClass(cls):
        logging.getLogger().addHandler(logging.NullHandler())
        cls.began, cls.servers = time.time(), []
        for command in RTORRENTS:
            for tcp in (False, True):
                folder = tempfile.mkdtemp(prefix='torque-')
                cls.addClassCleanup(shutil.rmtree, folder, ignore_errors=True)
                cls.servers.append(RTorrent(folder, command, tcp))
                cls.addClassCleanup(cls.servers[-1].stop, signal.SIGKILL)
                engine = cls.servers[-1].engine
                engine.reach()
                engine.speaks_json &= not tcp                   # XML here

    def own(self, command):
        """Start an rTorrent that a test may break."""
        return self.ended(RTorrent(self.path(str(RTORRENTS.index(command))), command))

    @on_each
    def test_hostile_names_arrive(self, server, proxy):
        emoji = server.load(*metafile(b'\xf0\x9f\x98\x80 \xc3\xa9'))
        if server.engine.speaks_json:
            self.assertEqual(server.engine.ask([('d.name', emoji)]), ['\U0001f600 \xe9'])
        hashes = [server.load(*metafile(b'a-%s-z' % raw)) for raw in HOSTILE]
        rows = dict(proxy.d.multicall2('', 'main', 'd.hash=', 'd.name='))
        self.assertEqual(len(rows), proxy.view.size('', 'main'))
        batched = server.engine.ask([('d.name', info_hash) for info_hash in hashes])
        for raw, info_hash, name in zip(HOSTILE, hashes, batched):
            for found in (name, rows[info_hash], proxy.d.name(info_hash)):
                self.assertRegex(found, '(?s)a-.+-z')
                if raw in PLAIN:
                    self.assertEqual(found, f'a-{raw.decode()}-z')

    @on_each
    def test_large_numbers_go_both_ways(self, server, proxy):
        info_hash = server.load(*metafile('large', length=6 << 30, **{
            'piece length': 1 << 24, 'pieces': bytes(20 * 384)}))
        self.assertEqual(proxy.d.size_bytes(info_hash), 6 << 30)
        for number in (2 ** 31, -2 ** 40, 2 ** 62):
            for door in (server.engine.ask, server.engine.tell):
                self.assertEqual(door([('value', '', number), ('cat', '', number)]),
                                 [number, str(number)])
            self.assertEqual(proxy.value('', number), number)

    @on_each
    def test_faults_cost_themselves(self, server, proxy):
        calls = [('no.such', ''), ('system.pid', ''), ('d.name', 'F' * 40), ('view.list', '')]
        for door in (server.engine.ask, server.engine.tell):
            missing, pid, lost, views = door(calls)
            self.assertIn(missing.code, MISSING)
            self.assertIsInstance(lost, HashNotFound)
            self.assertEqual((pid, views[0]), (server.process.pid, 'main'))
        self.fails('d.name: |info-hash', proxy.d.name, 'F' * 40, kind=HashNotFound)

    @on_each
    def test_stats_agree_with_single_calls(self, server, proxy):
        server.load(*metafile('stats'))
        stats, views = server.engine.stats(), proxy.view.list('')
        self.assertEqual(stats.views, {
            view: proxy.view.size('', view) if view in views else None for view in torque.VIEWS})
        self.assertEqual((stats.engine_id, stats.max_open_files, stats.version), (
            proxy.session.name(''), proxy.network.max_open_files(''),
            f"{proxy.system.client_version('')}/{proxy.system.library_version('')}"))
        self.assertTrue(0 <= stats.uptime <= time.time() - self.began + 2)
        url = find_url(os.path.join(server.folder, 'rtorrent.rc'))
        self.assertEqual(Engine(url).stats().engine_id, stats.engine_id)

    def test_deadly_calls_are_refused(self):
        for command in RTORRENTS:
            server = self.own(command)
            proxy, info_hash = server.engine.open(), server.load(*metafile('deadly'))
            inner = [{'methodName': 'f.path', 'params': [info_hash]}]
            for call in (('f.path', info_hash), ('f.path', info_hash.lower()), ('f.path',),
                         ('f.path', info_hash + ':t0'), ('f.size_bytes', ''),
                         ('t.multicall', info_hash, '', 'f.path='), ('system.multicall', inner),
                         ('branch', info_hash, 'd.hash=', 'f.path='),
                         ('load.start', '', '/x', 'f.path='),
                         ('d.multicall2', '', 'main', 'd.hash=', 'cat=$f.path=')):
                for door in (server.engine.ask, server.engine.tell):
                    self.fails('HASH:fINDEX', door, [('system.pid', ''), call])
                self.fails('HASH:fINDEX', getattr(proxy, call[0]), *call[1:])
            self.assertEqual(proxy.f.path(info_hash + ':f0'), 'deadly')
            self.assertEqual(proxy.d.multicall2('', 'main', 'f.multicall=,f.path='),
                             [[[['deadly']]]])

    def test_restarts_are_noticed(self):
        for command in RTORRENTS:
            server = self.own(command)
            engine, before = server.engine, server.engine.stats()
            server.stop(signal.SIGKILL)
            error = self.fails(f'{engine.address.where}: |not running?', engine.stats,
                               kind=Unreachable)
            self.assertTrue(error.told)
            server = self.own(command)
            self.assertNotEqual(engine.stats().engine_id, before.engine_id)


# --- Files ---------------------------------------------------------------------------------------

class MountsTest(Case):
    def test_mount_that_comes_between_two_looks(self):
        for looks, same in ('1 1', True), ('1 2 2 2', True), ('1 2 1 2 1 2', False), ('1', False):
            opened = [io.BytesIO(look.encode()) for look in looks.split()]
            with mock.patch('builtins.open', side_effect=[*opened, OSError]):
                self.gives(torque.has_our_mounts, (5, same))


# --- Fields and Filter ---------------------------------------------------------------------------

NOW, DAY = 1710500000, 86400                            # 2024-03-15 10:53:20 UTC
ROW = {'name': 'Arch-2024.iso', 'message': '', 'ratio': 1.5, 'prio': 2, 'done': 100.0, 'down': 0,
       'is_complete': True, 'is_ignored': 0, 'is_open': False, 'size': 5 << 30, 'fno': 3,
       'completed': NOW - 20 * DAY, 'loaded': NOW - 3600, 'started': 0, 'active': None, 'seedtime':
       60 * DAY, 'leechtime': None, 'tagged': ['new', 'Best'], 'views': [], 'kind': ['iso', 'txt'],
       'kind_25': ['iso'], 'traits': ['linux'], 'label': 'a b', 'files': ['sample/a.mkv', 'b.nfo'],
       'custom_note': 'x=1', 'd_priority': 2, 'd_peer': '7', 'path': '/srv/a', 'tracker': None,
       'alias': "it's"}


def timed(test, text, run):
    """Return whether run() gave a result, not a UserError; any other error, or 50 ms, fails."""
    for _ in range(2):
        began = time.process_time()
        try:
            run()
            result = True
        except LoggableError as error:
            test.assertNotIn('\n', str(error))
            result = False
        if time.process_time() - began < .05:
            return result
    return test.fail(f'{text!r} is slow')


class FilterTest(Case):
    def check(self, matching, other='', row=ROW):
        """Conditions stand two spaces apart."""
        for wanted, texts in ((True, matching), (False, other)):
            for text in filter(None, re.split(r'\s{2,}', texts)):
                with self.subTest(text):
                    self.assertIs(Filter(text).match(row, NOW), wanted)

    def refuse(self, make, table):
        """Keys are words of the message, values the texts, in a list or two spaces apart."""
        for words, texts in table.items():
            for text in re.split(r'\s{2,}', texts) if isinstance(texts, str) else texts:
                error = self.refused(words.replace(' ... ', '|'), make, text)
                self.assertLess(len(str(error)), 900)

    def test_text_is_globbed_whole(self):
        self.check(r"""
        name=arch-*  ARCH*  name=arch-????.iso  name=[ab]rch*  name=*.mkv,*.iso  message=  !*.mkv
        message=""  label="a b"  label='a b'  "label=a b"  label=a\ b  //  name=\*iso  name==arch*
        custom_note=x=1  alias="it's" """, """
        arch  name!=*.mkv,*.iso  message!=""  message!=  label!="a b"  name=!*.iso  name<>arch*""")

    def test_quoted_mark_is_no_comment(self):
        self.check(r'''"#1 Hit"  \#1*  name=#1*  /#1/  NOT "#2*"''', row={'name': '#1 Hit'})

    def test_comma_in_quotes_is_text(self):
        row = {'name': 'Crosby, Stills & Nash', 'tagged': ['a,b', 'c'], 'label': 'x,y'}
        self.check(r"""
        name="Crosby, Stills*"  name='Crosby, Stills*'  name=Crosby\,\ *  name=x,"Crosby, Stills*"
        name=/^crosby, s/  name=x,/y, S/  name="/y, s/",z  name~s,|y,  tagged=a\,b  tagged=c,d
        tagged="a,b"  label=x\,y  label=z,'x,y'  "label=x,y"  NOT name="Crosby, Still"
        NOT name=a,"b, c"  label="x,?"  NOT label="x,z"  name=/o{1,2}s/""", r"""
        NOT name="Crosby, Stills*"  name!="Crosby, Stills*"  name=Crosby,*Stills  label=x,y
        NOT label=x\,y  tagged=a,b""", row)

    def test_classes_of_characters_are_told(self):
        self.check('name=[ab]rch*  name=[!x]rch-*  name=arch-2024.is[o]', 'name=[xy]rch*')
        self.check('name=[TGx]film', 'name=[TGx]*', row={'name': '[TGx]film'})
        self.check('name=[TGx]*', 'name=[TGx]film', {'name': 'Grand'})
        text = 'ratio>1 [ name=[TGx]*,a OR NOT label=?[0-9] ] files="x[ab]"'
        self.assertEqual(Filter(text).classes, ['name=[TGx]*', 'label=?[0-9]',
                                                'files=x[ab]'])
        self.assertEqual(Filter('name=[x name=/[ab]/ name=x] d_x=[]').classes, [])

    def test_regex_searches(self):
        self.check(r"""
        /ARCH/  name=/[[a]rch/  name=/ch-\d+\.iso$/  name!=/mkv|avi/  path=/srv/a  path=/^\/srv/
        name~ch-2  name~ch-\d+\.iso$  name~h-\d{4,}  name~"c[h] *-"  name~'\d'  name~\d,|iso
        name=/a{1,2}rch/,x  name=/-([0-9]{2})+\./  name=/(rc)+/  label=/a b/ prio=2
        alias=/it's/  name="/ch-/"  done=100
        message=/^$|ghost/""", """
        message=/not registered/i  name=/^ch/  path=/srv OR name=/x/  path=/x OR name=a/""")
        self.check('message=/not registered/i', row={'message': 'Torrent Not registered.'})

    def test_folders_that_end_in_a_slash_are_several(self):
        for text, *paths in (('/data/a,/data/b/', '/data/a', '/data/b/'),
                             ('/data/a/,/data/b/', '/data/a/', '/data/b/x'),
                             ('/srv/tv/*,/srv/films/', '/srv/tv/x', '/srv/films/')):
            for path in paths:
                self.check(f'path={text}  NOT path!={text}', row={'path': path})
        self.check(r'path=/^/data/(a,b)/  path=/(\w{1,3}[.,]){1}\w/', row={'path': '/data/a,b'})
        self.check(r'tracker=/x/announce/,/y/  tracker=/^http://x{1,2}/  tracker=/p://\w+/\w$/',
                   'tracker=/x/announce/,/z/', row={'tracker': 'http://xx/y'})

    def test_long_text_is_cut_first(self):
        row = {'message': 'not' * 100000, 'files': ['a' * 100000] * 3, 'tagged': ['a' * 99999]}
        for text in ('message=/not.*registered/', 'files=*a*a*a*a*a*b', 'tagged=/a.*c/',
                     'message=*n*o*t*n*x', 'files=/a+b/'):
            compiled = Filter(text)
            self.assertTrue(timed(self, text, lambda: self.assertFalse(
                compiled.match(row, NOW))))
        row = {'message': 'not' * 9999, 'files': ['b', 'a' * 999]}
        self.check('files=*a*a*a  message=/n$/  message=*n', 'files=*a*b  message=/not$/', row)

    def test_numbers_and_sizes_compare(self):
        self.check("""
        ratio>1  ratio=+1  ratio<=1.5  ratio=1.5  prio>=2  prio=1,2  done=100  size>4g  size=5g
        down<5k  d_priority=2  d_priority>1  d_peer<8  d_peer=7*""", """
        ratio=-1  ratio<>1.5  prio!=1,2  size<4G  down>0  d_peer>7  d_priority!=2""")

    def test_text_that_is_a_number_compares(self):
        row = {'custom_num': '42', 'custom_grab': str(NOW - 3 * DAY), 'custom_1': 'x,+2d',
               'custom_add': f'{NOW - 3600}\n', 'custom_old': '', 'custom_2': '-1.5',
               'd_is_open': 1, 'd_state': 0, 'd_size': 5 << 30, 'd_text': 'yes'}
        self.check("""
        custom_num>40  custom_num>=42  custom_num=+40  custom_num=42.0  custom_num=4*
         custom_num!=41  custom_grab>2d  custom_grab=+2d  custom_grab<2024-03-15
        NOT custom_grab>4d  custom_grab=-1M  custom_grab>=1700000000  custom_add<2h  custom_2<0
        custom_1="x,+2d"  custom_1=*+2d  custom_old=  custom_old!=1  custom_old=!1,2  custom_1!=5
        d_is_open=y  d_is_open=on  d_is_open!=no  d_state=-  d_state=false  d_state!=+
        d_size=+4g  d_size>=5g  d_size=5g  d_size<6G  d_text=yes  d_text=y*  NOT d_text=no""", """
        custom_num>42  custom_num=-40  custom_grab<2d  custom_grab=+4d  custom_grab>2024-03-15
        custom_old>1  NOT custom_old>1  custom_old<1  custom_old=+1  NOT custom_old=+1
        NOT custom_1<2d  custom_1=1  d_is_open=n  d_state=yes  d_size=-4g  d_text=+4g  d_text>4
        NOT d_text=+4g  NOT d_text>4""", row)
        self.check('d_x>4k  d_x=yes  custom_x>2d', row={
            'd_x': torque.POSSIBLE, 'custom_x': torque.POSSIBLE})
        self.refuse(Filter, {
            'not a number ... 2 1.5 4g': 'd_x>4d  d_x<yes',
            'is not a number ... M for months and i for minutes':
            'custom_grab>2m  custom_grab>4g  custom_grab>x  custom_grab<'})

    def test_truth_words_are_taken(self):
        for yes, no in zip('yes true on y t 1 + YES'.split(), 'no false off n f 0 - No'.split()):
            self.check(f'is_complete={yes}  is_ignored={no}  is_complete!={no}', f'is_open={yes}')

    def test_ages_count_back_from_now(self):
        self.check("""
        completed>2w  completed=+2w  completed>=20d  completed<=20d  completed<3w  completed<1M
        loaded<1h30m  loaded<2h  loaded=-61i  loaded<1d30m  completed>2W  seedtime>8w  seedtime>0
        completed<1y2M3w4d5h6i7s""", 'completed<2w  completed>20d  seedtime<8w  loaded>1h30m')
        row = {'loaded': time.time() - 60}
        self.assertTrue(Filter('loaded<1h').match(row))

    def test_dates_are_local(self):
        row = {'completed': time.mktime((2024, 3, 15, 14, 50, 0, 0, 0, -1))}
        for text in '2024-03-15 03/15/2024 15.03.2024 2024-03-15T14 2024-03-15t14:49:59'.split():
            self.check(f'completed>={text}  completed>{text}', f'completed<{text}', row)
        self.check('completed<="2024-03-15 14:50"  completed=+1700000000  completed!=1700000000',
                   'completed>2024-03-15T14:50', row)
        self.check('completed=1710000060', row={'completed': 1710000060})

    def test_unknown_values_match_nothing(self):
        for field in ('started', 'active'):
            for rest in '>2w <2w >=2w <=2024-03-15 >2024-03-15 !=1700000000'.split():
                text = field + rest
                self.check('', f'{text}  NOT {text}  ! [ {text} ]  NOT [ {text} OR ratio>9 ]')
        self.check('started=0  completed!=0', """started>0  NOT started=0  active=0
            NOT active=0  tracker=*  tracker!=x  NOT tracker=x  free>1g  NOT free>1g  leechtime<2w
            NOT leechtime>2w""")
        for value in (5, -7, torque.EARLIEST - 1):      # of a clock that was not set yet, say
            self.check('custom_x<999d OR custom_x=*', """loaded>2w  NOT loaded<2w  loaded<2024-03-15
                custom_x>2w  NOT custom_x<2w  custom_x<2024-03-15  loaded=0  loaded!=0""",
                       {'loaded': value, 'custom_x': str(value)})

    def test_label_is_decoded_in_conditions(self):
        self.check("""
        label=Keep%20This  label=keep%20*  label="Keep This"  label=x,Keep%20This  label=/p%20t/
        label=!x%20y""", 'NOT label=Keep%20This  label!=Keep%20This  label=/%5E/',
                   {'label': 'Keep This'})
        self.check(r'label=%2A  label=*%2a  label=/^%2A$/', row={'label': '*'})
        self.check('label=%2F[x]%3F%2F  label=*/', 'label=%2Fy%2F', {'label': '/x?/'})
        # What stands for a character of a pattern is none.
        self.check('', 'label=%2A  label=%3F  label=%5Bxy%5D  label=%2Fx%2F  label=/%2E/',
                   {'label': 'x'})
        self.check('label=a%20%FF', 'label=a%20b', {'label': 'a%20%FF'})

    def test_what_is_not_known_yet_rules_out_soundly(self):
        rng, ruled_out = random.Random(7), 0
        parts = 'prio=2 prio>1 ratio<2 label=tv seeders>0 kind=mkv kind=: files=a'.split()

        def some(depth):
            if not depth:
                return rng.choice(parts)
            shape = rng.choice(('{} {}', '[ {} OR {} ]', 'NOT [ {} {} ]', 'NOT [ {} OR {} ]'))
            return shape.format(some(depth - 1), some(depth - 1))
        for _ in range(3000):
            text = some(rng.randint(0, 3))
            cheap = {'prio': rng.randint(1, 3), 'ratio': rng.choice((1, 3)),
                     'label': rng.choice(('tv', 'x'))}
            row = {**cheap, 'seeders': rng.randint(0, 2), 'kind': rng.choice(([], ['mkv'])),
                   'files': rng.choice((['a'], ['b']))}
            matches = Filter(text).match(row, NOW)
            possible = Filter(text).match({**dict.fromkeys(row, torque.POSSIBLE), **cheap}, NOW)
            self.assertIsNot(matches, Filter(f'NOT [ {text} ]').match(row, NOW), text)
            self.assertTrue(possible or not matches, text)
            ruled_out += not possible
        self.assertGreater(ruled_out, 500)

    def test_tags_and_files_are_lists(self):
        self.check("""
        tagged=new  tagged=NEW,x  tagged=b*  tagged!=:  views=:  views=  views=""  kind=!flac,mp3
        kind_25=:iso  kind_25==iso,x  kind_25==x,iso  files=sample/*  files=*.nfo  files=/NFO$/
        files!=*.rar""", """
        tagged=ne  tagged=:new  tagged=:  views=rtcontrol  kind=flac,mp3  kind==iso
        kind==x,iso  kind==iso,txt  files=b""")

    def test_values_are_spelt_as_the_field_has_them(self):
        row = {'kind': ['jpg', 'mpg', 'rar'], 'kind_25': ['jpg'], 'traits': ['img', 'jpg'],
               'throttle': '', 'prio': 3}
        self.check("""
        kind=jpeg  kind=JPEG,x  kind=mpeg  kind=r00  kind=R123  kind_25=:jpeg  kind_25==jpeg
        traits=jpeg  kind=/^\\S+$/  throttle=none  throttle=NONE,slow  throttle=
        prio>2  prio=!2""", """
        kind=jpegxl  kind=r1  kind!=jpeg  throttle!=none  throttle=!none  throttle=NULL""", row)
        self.check('NOT throttle=none', 'throttle=none', {'throttle': 'slow'})

    def test_groups_negate_and_join(self):
        self.check("""
        ratio>1 OR prio=3  ratio>9 prio=2 OR done=100  NOT ratio>9 prio=2  ! ratio>9
        NOT NOT ratio>1  NOT [ ratio>9 OR prio=3 ]  [ ratio>1\nOR\tprio=3 ]  [ [ prio=2 ] ]
        NOT [ ratio>1 prio=3 ] done=100""", """
        ratio>1 prio=3  ratio>9 [ prio=2 OR done=100 ]  !ratio>1  ![ prio=2 ]""")
        self.check('is_ignored=no done=100 message=/^$|ghost/ prio>0')      # of pyrocore's manual
        self.check('[ ' * 50 + 'prio=2' + ' ]' * 50 + '  ' + 'NOT ' * 900 + 'prio=2')

    def test_mistakes_are_shown_in_place(self):
        self.refuse(Filter, {
            "'<-- here' ... a condition is missing ... ratio>2": ['', '  ', '\n'],
            "'is_open=no ratio>>2 <-- here prio=1' ... '>2' is not a number ... e.g. 2 1.5":
            'is_open=no ratio>>2 prio=1',
            "'ratoi' is no field of a torrent; did you mean 'ratio'?": 'ratoi>2', "mean 'is_open'":
            'is-open=no', 'is no field': 'kind_101=x  custom_=x  kind_=x',
            'this is no condition ... side by side': '*x=y*  x and y  x or y  !=x',
            "<-- here b' ... # begins no comment here; put it on a line of its own, or quote it":
            'name=a # b  name=a #x b  # b  [ x #] b',
            'a condition is missing': """OR x  x OR  x OR OR y  NOT  x [ NOT ]  [ ]  x OR ] y
            [ NOT OR x ]""", 'a bracket without its other half': '[ x  x ]  [ x ] ]',
            "'x ] <-- here y'": 'x ] y', 'a quote has no': 'name="a  name=\'  x\\',
            "'maybe' is neither ... allowed are yes": 'is_open=maybe  is_open=maybe,yes',
            'does not go with bool; allowed are = and !=': 'is_open>0', 'with text': 'name>a',
            'with tags': 'tagged<x', 'not a number': 'ratio=  ratio>+1  ratio>1,2  ratio=1k  d_x>a',
            "'/foo' begins as a /regex/ and does not end as one; write '/foo/', or */foo for the":
            '/foo  name=/foo  name=!/foo  NOT a,/foo  name="/foo"  tagged=/foo',
            'does not end as one': 'message=/not registered  label=/tv/x  name=/x/I  kind==/x',
            "'.mkv' begins with a dot, as no kind_9 does; allowed is mkv": 'kind_9=.mkv',
            'begins with a dot': 'kind=a,.mkv  NOT kind=.mkv  kind==.mkv  traits=!.mkv',
            'prio is 0, 1, 2 or 3: this can never be true':
            'prio=9  prio>3  prio>=4  prio<0  prio=2,4  prio=1.5',
            'not a size ... 4g': ['size>4x', 'size=', 'size>' + '9' * 99],
            'not a time; ... 2024-03-15 ... 8w ... M for months and i for minutes': '''completed>2m
            loaded<1y2m  completed>2w2w  completed>1x  completed>  completed>2024-13-01
            completed>30''', 'not a duration; ... 8w ... M for months and i for minutes':
            'seedtime>5m  seedtime>8  seedtime>2024-03-15',
            'does not go with =; allowed are < <= > >= =+ =-':
            'completed=2w  completed!=2024-03-15  seedtime=1h',
            'a value is missing beside a comma': 'kind=a,  name=a,,b', 'not a regex': 'name=/(/',
            'for ever ... (ab)+': r'name=/(a+)+$/  /((a*)b)*/  /(\w{1,9})+-/  /((a{2,})b){3,}/',
            'no template': 'path!={{d.path}}',
            'a glob, up to 500': ['a' * 501],
            'too long; allowed are 4000 ... 50 brackets': ['x' * 5000, '[ ' * 1000]})

    def test_random_text_is_compiled_or_refused(self):
        rng = random.Random(11)
        words = [*TORRENT_FIELDS,
                 *' \n,"\'\\*?()+{}3m:é\0\x1b\u20280^$|-.a=<~![]/   ', ' [ ', ' ] ',
                 ' OR ', ' NOT ', '9' * 30, *'!= >= == //i [a 2w 1M 1.5 4g yes {{ 2024-03-15'
                 ' d_x kind_5 custom_ (?P< (?i) [[: \\1 z-a]'.split()]
        compiled = 0
        for _ in range(20000):
            text = ''.join(rng.choice(words) for _ in range(rng.randint(1, 12)))
            compiled += timed(self, text, lambda: Filter(text).match(ROW, NOW))
        self.assertGreater(compiled, 500)


# --- Torrents ------------------------------------------------------------------------------------

HASH = '{:040X}'.format
NONE = 'none'                           # a hash that no item has


def make_job(kind, engine, state_dir, **settings):
    """Return a built-in job, its options read as from an ini."""
    config = Settings({'job_name': 't', 'dry_run': False, **settings}, engine=engine,
                      engines=(), state_dir=state_dir, alone=settings.get('alone'))
    for option in kind.options:
        text = config.get(option.name, config.get(option.alias, option.default))
        config[option.name] = None
        if text != '' or option.kind == 'text':
            config[option.name] = option.parse(text)
    return kind(config)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program goes on after it."""


class Double:
    """Engine of an rTorrent that is a dict of items.

    items: dicts of what d. commands answer; those of add() have data, too. faults: (method, target)
    or one of the two -> what is answered instead, raised, or called.
    """
    aliases, session_path, views, takes = {'T': ['http://t/']}, '/session/', (), 'load.'
    address = types.SimpleNamespace(where='double', kind='http', is_local=lambda: False)
    same_files, cwd, methods = True, '/cwd', frozenset()
    FILES = [['a.mkv', 90, 1], ['b.txt', 10, 1]]
    TRACKERS = [['http://off/', 0, 9, 9, 5, 0, 0], ['http://t/x', 1, 3, 4, 2, 1, 0],
                ['dht://', 1, 0, 0, 0, 0, 0]]

    def __init__(self, items=(), faults=()):
        self.items, self.asked, self.told, self.faults = {}, [], [], dict(faults)
        for number, item in enumerate(items):
            self.items[HASH(number)] = {'d.hash': HASH(number), 'd.name': f'n{number}', **item}

    def reach(self):
        pass

    def say_once(self, text):
        pass

    def has_view(self, view):
        return view in self.views

    def step(self):
        """Come before each request; a test may have it raise."""

    def ask(self, calls):
        self.step()
        calls = list(calls)
        self.asked += calls
        return [self.answer_or_fault(*call) for call in calls]

    tell = ask

    def answer_or_fault(self, method, target, *params):
        for key in ((method, target), method, target):
            fault = self.faults.get(key)
            if callable(fault):         # something that happens at that moment
                fault = fault()
            if isinstance(fault, (Unreachable, Killed)):
                raise fault
            if fault is not None:
                return fault
        return self.answer(method, target, *params)

    def add(self, path, files=b'x' * 9000, **values):
        """Add an item, the data with it; return its hash."""
        folder, name = os.path.split(path)
        put_data(folder, name, files)
        rows = [[name, 9000, 1]]
        if isinstance(files, dict):
            folder, rows = path, [[name, len(files[name]), 1] for name in files]
        info_hash = HASH(len(self.items) + 1)
        item = dict.fromkeys('complete is_active state completed_bytes is_open down.total '
                             'timestamp.started'.split(), 1)
        item.update(hash=info_hash, name=name, base_path=path, directory=folder, files=rows,
                    directory_base=folder, is_multi_file=int(folder == path), views=[],
                    bitfield='', hashing=0, hashing_failed=0)
        item.update(values)
        self.items[info_hash] = {f'd.{key}': value for key, value in item.items()}
        return info_hash

    def answer(self, method, target, *params):
        if params[1:2] == (f'cat={torque.BUSY}',):
            item = self.items.get(target, {})
            is_checked = item.get('d.hashing') and not item.get('d.hashing_failed')
            if is_checked or 'd.state=' in params[0] and item.get('d.state'):
                return torque.BUSY
            return self.answer_or_fault(params[2].rstrip('='), target)
        shown = [item for item in self.items.values()
                 if not params or params[0] in item.get('views', params[:1])]
        facts = {'system.cwd': self.cwd, 'directory.default': '/default', 'view.size': len(shown),
                 'session.path': self.session_path, 'view.size_not_visible': 0}
        if method in facts:
            return facts[method]
        if method == 'd.multicall2':
            return [[item.get(name.rstrip('=').replace('"', ''), '' if re.search(
                'custom|throttle|message|base_path|directory=', name) else 0)
                     for name in params[1:]] for item in shown]
        if method.startswith('load.'):
            return self.load(method, *params)
        if target not in self.items:
            return target and HashNotFound('info-hash not found')
        item = self.items[target]
        if method == 't.multicall':
            return self.TRACKERS
        if method == 'f.multicall':
            return [[self.file(item, *row)[name] for name in params[1:]]
                    for row in item.get('d.files', self.FILES)]
        if method in item and not params:
            return item[method]
        self.told.append(' '.join(map(str, (method, *params))).strip())
        self.change(item, method.replace('.set', ''), *params)
        return 0

    def file(self, item, path, size, chunks):
        """Return what f. commands answer."""
        frozen = item.get('d.base_path', '')
        if item.get('d.is_multi_file'):
            frozen += '/' + path
        is_created = os.path.exists(os.path.join(self.cwd, frozen))
        return {'f.path=': path, 'f.size_bytes=': size, 'f.completed_chunks=': chunks,
                'f.range_first=': 0, 'f.range_second=': 1, 'f.priority=': 1,
                'f.frozen_path=': frozen, 'f.is_created=': int(is_created)}

    def load(self, method, source, *commands):
        tied = ''
        if 'raw' not in method:
            tied = os.fsdecode(source)
        if method.startswith(self.takes):
            if tied:
                with open(tied, 'rb') as stream:
                    source = stream.read()
            info_hash = parse_metafile(source).info_hash
            self.items[info_hash] = {'d.hash': info_hash, 'd.tied_to_file': tied}
        return 0

    def change(self, item, command, *params):
        """Do with an item what a command does."""
        if command == 'd.erase':
            del self.items[item['d.hash']]
        elif command == 'd.custom':
            item[f'd.custom={params[0]}'] = params[1]
        elif command.startswith('d.directory'):
            base, = params
            if item['d.is_multi_file'] and command == 'd.directory':
                base = os.path.join(base, item['d.name'])
            item['d.directory'] = item['d.directory_base'] = base
        elif params:
            item[command] = params[0]
        elif command == 'd.open':
            item.update({'d.is_open': 1, 'd.base_path': item['d.directory']})
            if not item['d.is_multi_file']:
                item['d.base_path'] += '/' + item['d.name']
        elif command == 'd.close':
            item.update({'d.is_open': 0, 'd.is_active': 0})
        elif command in ('d.start', 'd.stop'):
            item['d.state'] = item['d.is_active'] = int(command == 'd.start')


# A function, its arguments >> what it gives.
WORKED_OUT = r'''
first_time 0, '' >> 0
first_time '0', 7 >> 7
first_time '12', 7 >> 12
first_time 'x', '-3' >> 0
time_loaded '7', '5\n', 900, SESSION, 'H' >> 7
time_loaded '', '5\n', 900, SESSION, 'H' >> 5
time_loaded '', '', 900, SESSION, 'H' >> 400
time_loaded '', '', 300, SESSION, 'H' >> 300
time_loaded '', 'x', 900, SESSION, 'no' >> 900
time_loaded '', '', 900, '', 'H' >> 900
time_loaded '', '', 900, SESSION, '\0' >> 900
time_loaded '', '', 0, '', 'H' >> 0
seed_time 'R100P200R300', 150, 0, 1, 1, 400 >> 150
seed_time 'R100P200', 250, 0, 1, 0, 400 >> 0
seed_time '', 0, 0, 1, 1, 9 >> None
seed_time '', 0, 100, 1, 1, 400 >> 300
seed_time 'P5R60P70', 1, 0, 1, 0, 99 >> 10
seed_time '', 100, 0, 1, 0, 400 >> None
seed_time '', 100, 0, 0, 1, 400 >> None
leech_time 'R100P200R300P350', 100, 0, 320, 0, 999 >> 120
leech_time '', '', 100, 0, 320, 999 >> 220
leech_time '', '100', 0, '', 0, 150 >> 50
leech_time '', 0, 0, 320, 0, 999 >> None
leech_time '', 400, 0, 0, 320, 999 >> 0
time_stopped 'R1P25R3', 0, 9, '', 1 >> 25
time_stopped 'R1P25R3P40', 1, 9, '', 1 >> 40
time_stopped '', 0, 9, '', 1 >> 9
time_stopped '', 1, 9, '', 1 >> 0
time_stopped '', 0, 9, '', 0 >> 0
time_stopped 'x', 0, '9', 7, 0 >> 9
data_path '/c', '/b/x', '/d', 'x', 0, 1 >> '/b/x'
data_path '/c', '/b/x', '/d', 'x', 0, 0 >> '/d/x'
data_path '/c', '', '/d', 'x', 0, 0 >> '/d/x'
data_path '/c', '', '/d/x', 'x', 1, 0 >> '/d/x'
data_path '/c', './x', './', 'x', 0, 1 >> '/c/./x'
data_path '/c', '', '', 'x', 0, 0 >> ''
'''


class TorrentsTest(Folder):
    def test_tracker_has_short_name(self):
        aliases = {'PBT': ['http://t.pbt/', 'udp://x'], 'KEY': ['http://key.in:80/announce'],
                   'BARE': ['Bare.org'], 'NONE': []}
        for url, name in sides('''
                http://t.pbt/announce?k=1 >> PBT
                udp://x:80 >> PBT
                >>
                http://key.in:80/0123/announce >> KEY
                http://key.in/announce >> key.in
                http://T.Example.org:6969/a >> example.org
                http://10.0.0.1:80/ >> 10.0.0.1
                http://[::1]:80/ >> [::1]
                http://localhost/ >> localhost
                https://a.b.example.co.uk/ >> example.co.uk
                udp://u:p@a.b.c:1 >> b.c
                udp://Tracker.Bare.org:7/a?b >> BARE
                http://bare.org/ >> BARE
                http://rebare.org/ >> rebare.org'''):
            self.gives(torque.tracker_alias, (url, aliases, name))

    def test_times_are_worked_out(self):
        os.utime(self.write('session/H.torrent', ''), (400, 400))
        session = repr(self.path('session/'))
        # The table has small numbers.
        self.enter(mock.patch('torque.EARLIEST', 1))
        for call, expected in sides(WORKED_OUT.replace('SESSION', session)):
            name, params = call.split(' ', 1)
            self.gives(getattr(torque, name),
                       (*ast.literal_eval(params), ast.literal_eval(expected)))

    def test_time_before_1973_is_none(self):
        os.utime(self.write('H.torrent', ''), (5, 5))
        early, now = torque.EARLIEST - 1, torque.EARLIEST
        self.gives(torque.first_time, (early, now, now), ('5\n', f'{now}\n', now), (early, 0))
        self.gives(torque.time_loaded, ('7', '', now, self.path(''), 'H', now),
                   ('', '', early, self.path(''), 'H', 0))
        self.gives(torque.seed_time, ('', early, 0, 1, 1, now, None))
        self.gives(torque.time_stopped, ('R1P5', 0, early, '', now, 0))

    def test_trackers_tell_what_they_know(self):
        def told(*rows):
            return (torque.first_tracker(rows), torque.alias_of(rows, {'T': ['http://t/']}),
                    TORRENT_FIELDS['seeders'].value(rows), TORRENT_FIELDS['leechers'].value(rows))
        off, on = ['http://off/', 0, 9, 8, 5, 0, 0], ['http://t/', 1, 0, 0, 5, 0, 0]
        dht = ['dht://', 1, 0, 0, 0, 7, 0]
        announced, scraped = [*on[:2], 3, 4, 0, 7, 7], [*on[:2], 2, 5, 5, 0, 7]
        silent = [*on[:2], 0, 0, 0, 7, 0]
        self.gives(told, (('', '', None, None),), (dht, ('', '', None, None)),
                   (off, (None, None, None, None)), (dht, off, (None, None, None, None)),
                   (off, on, dht, ('http://t/', 'T', None, None)),
                   (silent, dht, ('http://t/', 'T', None, None)),
                   (announced, ('http://t/', 'T', 3, 4)), (on, scraped, ('http://t/', 'T', 2, 5)),
                   (announced, scraped, ('http://t/', 'T', 3, 5)))

    def test_files_tell_their_kind(self):
        rows = [['x/a.MKV', 70], ['b.nfo', 20], ['c.jpeg', 10], ['README', 0]]
        self.gives(torque.file_kinds, (rows, ['jpg', 'mkv', 'nfo']), (rows, 20, ['mkv', 'nfo']),
                   (rows, 100, []), ([], []),
                   ([['x.r00', 30], ['x.R101', 30], ['x.nfo', 40]], 51, ['rar']),
                   ([['x.jpegxl', 1], ['x.r1', 1], ['x.MPEG', 1]], ['jpegxl', 'mpg', 'r1']))
        for name, wanted in sides('''
                Show.S01E02.720p >> tv mkv
                Film (1999) x >> movie avi
                Band - Album >> audio flac
                q >> video mp4
                Show.S01E02 >> tv rar
                Show 1x02 >> tv mkv'''):
            wanted = wanted.split()
            self.gives(torque.guess_traits, (name, [['x.' + wanted[-1], 1]], wanted))
        self.gives(torque.guess_traits, ('q', [['x.xyz', 1]], []))

    def test_names_tell_traits(self):
        for name, told in sides('''
                Some.Show.S01E02.Title.Here.720p.HDTV.x264-GRP >> tv|Title.Here|x264|GRP
                Show.2001.02.03.Guest.Name.WEB-DL.H.264-2HD >> tv|Guest.Name|H.264|2HD
                Show.S01E02.720p >> tv|||
                Show.S01E01-E02 >> tv|E02||
                Show S01E02 - The.Web.of. >> tv|The.Web.of.||
                Show.S01. >> tv|||
                Show.S01E02.WEB-DL >> tv|||
                Film.1999-2000 >> movie|Film||
                Film.(1999).1080p.BluRay.HEVC-X_Y >> movie|Film|HEVC|X_Y'''):
            with self.subTest(name):
                traits = torque.name_traits(name, 'mkv')
                self.assertEqual('{kind}|{title}|{codec}|{group}'.format(**traits), told)

    def test_place_of_data_is_known(self):
        device, free = torque.disk_of(self.path('not', 'yet', 'there'))
        self.assertEqual(device, os.stat(self.folder).st_dev)
        self.assertGreater(free, 0)
        self.assertEqual(torque.disk_of(''), (None, None))

    def test_answers_of_wrong_types_are_one_error(self):
        class Odd(dict):
            def get(self, key, default=None):
                return default if key == 'views' else self['odd']
        refused = 0
        for value in ('x', 7, None, [], {}, [[]], -1, 1 << 70, 2.5, '\0'):
            for name, field in TORRENT_FIELDS.items():
                condition = Filter(f'{name}=x OR NOT {name}=y') if field.kind == 'text' else None
                for rows in ([[value] * 9], value):
                    engine = Double((), {'f.multicall': rows, 't.multicall': rows})
                    engine.items[HASH(0)] = Odd(odd=value)
                    try:
                        list_torrents(engine, 'main', [name], condition)
                    except RpcError:
                        refused += 1
        self.assertGreater(refused, 100)

    def test_unknown_fields_are_refused(self):
        for name, words in sides('''
                nmae >> did you mean 'name'
                custom_ >> no field
                kind_101 >> no field
                kind_x >> no field
                d_ >> no field
                d_a b= >> no field
                d_erase >> changes something
                d_custom1.set >> changes
                d_try_start >> changes
                d_tracker.send_scrape >> changes'''):
            self.refused(words, torque.torrent_field, name)
        self.refused('d.erase changes', parse_condition, 'is_complete=yes d_erase=0')
        self.assertEqual([torque.torrent_field(f'custom_{key}').needs[0] for key in (
            '5', '12', 'a"b\\')], ['d.custom5', 'd.custom="12"', 'd.custom="a\\"b\\\\"'])

    def test_one_table_serves_conditions(self):
        self.addCleanup(TORRENT_FIELDS.pop, 'names')
        TORRENT_FIELDS['names'] = torque.TorrentField(   # as a custom job adds one
            'number', ('files', 'd.name'), lambda rows, name: len(rows) + len(name))
        fake = Double([{'d.name': 'x' * size} for size in range(5)])
        found = list_torrents(fake, 'main', [], parse_condition('names>4'))
        self.assertEqual([torrent['name'] for torrent in found], ['xxx', 'xxxx'])

    def test_only_what_is_needed_is_asked(self):
        fake = Double([{'d.complete': number % 2} for number in range(10)])
        condition = parse_condition(
            '[ files=a* kind_50=mkv alias=t NOT kind_50=jpg ] NOT [ is_complete=no OR files=x ]')
        found = list_torrents(fake, 'main', ['name', 'trackers_failed'], condition)
        self.assertEqual([(torrent['name'], torrent['trackers_failed']) for torrent in found],
                         [(f'n{number}', 1) for number in range(1, 10, 2)])
        self.assertEqual(fake.asked[:2], [
            ('d.multicall2', '', 'main', 'd.hash=', 'd.name=', 'd.complete='),
            ('view.size', '', 'main')])
        self.assertEqual([call[0] for call in fake.asked[2:]],
                         ['f.multicall'] * 5 + ['t.multicall'] * 5)

    def test_age_of_session_file_is_seen_where_files_are_ours(self):
        old, noted, new = 10 ** 9, 10 ** 9 + 5, 10 ** 9 + 900
        fake = Double([{'d.load_date': new},
                       {'d.load_date': new, 'd.custom=addtime': f'{noted}\n'}])
        for item in fake.items:
            for folder in ('session/', ''):
                os.utime(self.write(f'{folder}{item}.torrent', ''), (old, old))
        fake.cwd, condition = self.folder, parse_condition('loaded<2001-12-31')
        for fake.session_path, fake.same_files, loaded in (
                ('session/', True, [old, noted]), ('session/', False, [new, noted]),
                ('', True, [new, noted])):      # without a session its folder is not the cwd
            rows = list_torrents(fake, 'main', [], condition)
            self.assertEqual([row.loaded for row in rows], loaded)

    def test_label_is_decoded(self):
        for raw, label in sides('''
                TV%20Shows >> TV Shows
                ..%2F..%2fetc >> ../../etc
                100% >> 100%
                %C3%A9 >> \xe9
                \xe9 >> \xe9
                %FF >> %FF
                50%25 >> 50%
                >>'''):
            self.gives(torque.decoded_label, (raw, label))
        fake = Double([{'d.custom1': 'TV%20Shows'}])
        row, = list_torrents(fake, 'main', ['label', 'custom_1'], parse_condition(
            'label="TV Shows" label=tv%20* custom_1=TV%20Shows custom1=*%20*'))
        self.assertEqual(list_torrents(fake, 'main', [], parse_condition('NOT label=TV%20Shows')),
                         [])
        self.assertEqual((row.label, row.custom_1), ('TV Shows', 'TV%20Shows'))

    def test_row_reads_as_attributes_too(self):
        row, = list_torrents(Double([{'d.size_bytes': 5}]), 'main', ['size'])
        self.assertEqual((row.size, row['size'], row.name), (5, 5, 'n0'))
        self.fails("the field 'ratio' was not asked for", getattr, row, 'ratio',
                   kind=AttributeError)

    def test_half_a_list_is_an_error(self):
        fault = RpcError('fault -503')
        for method, answer, words in (
                ('view.size', 3, 'only 2 of the 3'), ('view.size', fault, '503'),
                ('d.multicall2', [['A' * 40]], 'only 0 of'), ('d.multicall2', 'junk', 'only 0 of'),
                ('d.multicall2', fault, '503'), ('f.multicall', fault, '503')):
            with self.subTest(words, method=method), \
                    self.assertRaisesRegex(RpcError, words):
                list_torrents(Double([{}, {}], {method: answer}), 'main', ['files'])

    def test_vanished_torrent_is_left_out(self):
        fake = Double([{}, {}, {}], {HASH(1): HashNotFound('gone')})
        self.assertEqual([torrent['name'] for torrent in list_torrents(
            fake, 'main', ['files', 'alias'])], ['n0', 'n2'])
        self.assertEqual(list_torrents(Double(), 'main', ['files']), [])


# What every field has to be, worked out from the answers of single d. calls.
PLAIN_FIELDS = dict((pair + ':' + pair).split(':')[:2] for pair in (
    'hash name message directory throttle:throttle_name views metafile:tied_to_file label:custom1 '
    'size:size_bytes uploaded:up.total left:left_bytes downloaded:down.total up:up.rate is_open '
    'down:down.rate fno:size_files prio:priority peers:peers_connected d_state:state is_active '
    'custom_1:custom1 custom_2:custom2 is_private is_complete:complete is_multi_file '
    'is_ignored:ignore_commands is_hashing:hashing').split())
SINGLE = sorted({f'd.{word}' for word in (*PLAIN_FIELDS.values(), *(
    'base_path ratio completed_bytes load_date timestamp.started timestamp.finished tracker_size '
    'state_changed'.split()))})
CUSTOMS = ('tags', 'tm_loaded', 'addtime', 'tm_completed', 'a key')
TRACKER = ('url', 'is_enabled', 'scrape_complete', 'scrape_incomplete', 'failed_time_last',
           'success_time_last', 'scrape_time_last')


def expected(raw, files, trackers, session, now):
    """Return what fields have to be; files: (path, size), trackers: columns of t. calls."""
    path = raw['d.is_open'] and raw['d.base_path'] or raw['d.directory'] + (
        '' if raw['d.is_multi_file'] else '/' + raw['d.name'])
    known = not torque.DOUBTFUL.search(path) and os.path.isdir(os.path.dirname(path))
    done = int(raw['tm_completed'] or raw['d.timestamp.finished'])
    began = raw['d.timestamp.started']
    born = os.stat(f"{session}{raw['d.hash']}.torrent").st_mtime
    kinds = {name.rpartition('.')[2]: size for name, size in files if '.' in name}
    most = [kind for kind, size in kinds.items() if size >= .51 * raw['d.size_bytes']]
    first = ''.join([url for url, enabled, *_ in trackers if enabled and url != 'dht://'][:1])
    told = [row for row in trackers if row[6]]
    return {
        **{name: raw[f'd.{word}'] for name, word in PLAIN_FIELDS.items()},
        'label': raw['d.custom1'].replace('%20', ' '),
        'path': path, 'realpath': os.path.realpath(path) if known else None,
        'is_ghost': not os.path.exists(path) if known else None,
        'sessionfile': f"{session}{raw['d.hash']}.torrent", 'ratio': raw['d.ratio'] / 1000,
        'done': 100 * raw['d.completed_bytes'] / raw['d.size_bytes'], 'started': began,
        'xfer': raw['d.up.rate'] + raw['d.down.rate'], 'completed': done, 'active': 0,
        'loaded': int(raw['tm_loaded'] or raw['addtime'] or min(raw['d.load_date'], born)),
        'last_xfer': 0,
        'stopped': 0 if raw['d.state'] or not began else raw['d.state_changed'],
        'leechtime': max((done or now) - began, 0) if began else None,
        'seedtime': now - done if done and raw['d.complete'] and raw['d.is_active'] else None,
        'tagged': raw['tags'].split(), 'custom_a key': raw['a key'], 'tracker': first,
        'alias': 'LO' if '127.0' in first else first and 'example.org',
        'seeders': max([row[2] for row in told], default=None),
        'leechers': max([row[3] for row in told], default=None),
        'trackers_failed': len([1 for row in trackers if row[1] and row[4] > row[5]]),
        'files': [name for name, _ in files], 'kind': sorted(kinds), 'kind_51': most,
        'traits': ['tv', 'mkv'] if 'S01E' in raw['d.name'] else ['audio', 'mp3']
        if 'mp3' in most else ['video', 'mkv'] if 'mkv' in most else []}


CONDITIONS = r'''is_complete=yes | is_complete   * | True   done=0 fno>1 | done == 0 and fno > 1
is_complete=yes ratio=0 prio>1 | is_complete and ratio == 0 and prio > 1   tagged=: | not tagged
size>20k [ prio=3 OR label=two ] | size > 20480 and (prio == 3 or label == 'two')
NOT [ is_open=yes OR prio=0 ] | not (is_open or prio == 0)   tagged=red | 'red' in tagged
message= is_ignored=no | not message and not is_ignored   name=*s01e* traits=tv | 'S01E' in name
name=/S0.E\d/ !is_private=yes | 'S01E' in name and not is_private   label= | label == ''
label="TV Shows" | label == 'TV Shows'
label=one,two | label in ('one', 'two')   label!=one | label != 'one'
label!="" | label   tagged=:red | tagged == ['red']   tagged!=: | tagged
free>1 prio>2 | realpath and prio > 2
views=mine | 'mine' in views   throttle=slow | throttle == 'slow'   path=*/mo*/* | 'moved/' in path
files=*.mp3 | 'mp3' in kind   files=sub/* is_complete=no | not is_complete and 'txt' in kind
kind=mp3,mkv size>9k | {'mp3', 'mkv'} & {*kind} and size > 9216   kind_51=mp3 | 'mp3' in kind_51
alias=lo | alias == 'LO'   tracker=*e.org* OR prio>2 | 'e.o' in tracker or prio > 2
NOT seeders>0 | seeders == 0
is_ghost=no prio<3 | is_ghost is False and prio < 3   completed>1y | 0 < completed < now - 31536000
completed<1y is_complete=yes | completed > now - 31536000 and is_complete   d_state=1 | d_state
loaded<2015-01-01 | loaded < 1420000000   started<1d prio!=2 | started > now - 86400 and prio != 2
stopped<1h | stopped > now - 3600   seedtime>1y | (seedtime or 0) > 31536000
leechtime<1h is_open=no | leechtime is not None and leechtime < 3600 and not is_open
custom_2=*é* | 'é' in custom_2   message=/track|unf/ | re.search('Track|unf', message)
is_multi_file=yes [ size<30k OR ! kind=txt ] | fno > 1 and (size < 30720 or 'txt' not in kind)'''
# Of the torrents whose number leaves this rest over that: what rTorrent is told of them, in order
STATES = '''11 1 d.directory.set|DATA/moved
10 1 d.throttle_name.set|slow
12 1 d.custom1.set|two
12 4 d.custom1.set|one
12 7 d.custom1.set|one
12 10 d.custom1.set|Three, 4
12 11 d.custom1.set|TV%20Shows
6 5 d.custom2.set|h\xe9llo
12 2 d.custom.set|tags|blue
12 6 d.custom.set|tags|red
12 10 d.custom.set|tags|red blue
13 1 d.custom.set|tm_loaded|1400000000
13 4 d.custom.set|addtime|1300000000
9 3 d.custom.set|tm_completed|1500000000
17 1 d.custom.set|a key|x, "y"
8 3 d.views.push_back_unique|mine
6 1 d.ignore_commands.set|1
5 4 d.open
3 0 d.start
29 1 d.start
29 2 d.update_priorities
174 1 d.pause
174 59 d.pause
87 2 d.check_hash
87 31 d.check_hash'''
ODD_NAMES = ['a; b', '$(id)', "q'\"", 'a,b', '{{name}}', '$d.erase=', '&<>]]>', 'caf\xe9',
             ' s p ', '\x01ctl', '\U0001f600', b'\xff\xfe', '%41', '-rf', '\\n', 'tab\tx']


class LiveTorrentsTest(Case):
    number, count, hostile = 0, 1000, ODD_NAMES

    @classmethod
    def setUpClass(cls):
        command = rtorrent_command(cls.number)
        cls.folder = tempfile.mkdtemp(prefix='torque-')
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        cls.server = RTorrent(cls.folder, command)
        cls.addClassCleanup(cls.server.stop, signal.SIGKILL)
        cls.engine, cls.proxy = cls.server.engine, cls.server.engine.open()
        cls.engine.aliases = {'LO': ['http://127.0.0.1']}
        cls.load_mixed_states()
        cls.proxy.view.add('', 'some')
        cls.proxy.view.filter('', 'some', 'd.complete=')
        wait_for(cls.take_stock)

    @classmethod
    def load_mixed_states(cls):
        """Load the torrents and bring them into their states."""
        loads, calls, complete, data = [], [], set(), cls.folder + '/data'
        for at in range(cls.count):
            name, files = f'item {at}', 1000 + at * 37
            if at % 9 == 0:
                name, files = f'Show.S01E{at}', {'x.mkv': 50000, 'y.nfo': 9}
            elif at % 4 == 0:
                files = {'a.mp3': at % 50 * 500 + 1, 'sub/deep/b.txt': 9000}
            if at < len(cls.hostile):
                name = cls.hostile[at]
            host, info = '127.0.0.1', {}
            if at % 5 == 0:
                host = 'a.example.org'
            if at % 7 == 0:
                info = {'private': 1}
            content, item = metafile(name, files, f'http://{host}:1/a', **info)
            if at % 3 == 0 and at >= len(cls.hostile):
                put_data(data + '/moved' * (at % 11 == 1), name, files)
                complete.add(item)
            loads.append(('load.raw', '', content, f'd.priority.set={at % 4}'))
            for line in STATES.replace('DATA', data).splitlines():
                step, rest, call = line.split(' ', 2)
                method, *params = call.split('|')
                if at % int(step) == int(rest):
                    calls.append((method, item, *params))
        for start in range(0, len(loads), 100):
            cls.engine.tell(loads[start:start + 100])
        wait_for(lambda: cls.proxy.view.size('', 'main') == cls.count)
        cls.engine.tell(calls)
        wait_for(lambda: all(cls.engine.ask(('d.complete', item) for item in complete)))
        kept = [f'{cls.folder}/session/{item}.torrent' for item in cls.proxy.download_list('')]
        wait_for(lambda: all(map(os.path.exists, kept)))
        for path in kept[::9]:                          # as if they were loaded long ago
            os.utime(path, (1200000000, 1200000000))
        some = sorted(complete)[:40]
        cls.engine.tell([('d.stop', item) for item in some] + [
            ('d.close', item) for item in some[:30]])
        for item in some[:10]:                          # these lose their data, and fail
            path = cls.proxy.d.base_path(item)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        cls.engine.tell(('d.start', item) for item in some[:10])
        wait_for(lambda: not any(cls.engine.ask(('d.state', item) for item in some[:10])))

    @classmethod
    def take_stock(cls):
        """Ask rTorrent item by item, before and after the lists; tell whether it was quiet."""
        cls.now = time.time()
        cls.items = cls.item_by_item()
        with mock.patch('time.time', return_value=cls.now):
            cls.listed = list_torrents(cls.engine, 'main', [
                *next(iter(cls.items.values())), 'free'])
            cls.found = {text: {torrent['hash'] for torrent in list_torrents(
                cls.engine, 'main', [], parse_condition(text))}
                for text, _ in cls.conditions()}
        after = cls.item_by_item()
        cls.moved = {item for item, values in cls.items.items() if values != after[item]}
        return len(cls.moved) < cls.count / 10          # announces go on meanwhile

    @classmethod
    def item_by_item(cls):
        """Return {hash: values of the fields}, worked out from single d., f. and t. calls."""
        hashes, result = cls.proxy.download_list(''), {}

        def ask(calls):
            answers = iter(cls.engine.ask(calls))
            return lambda count: [next(answers) for _ in range(count)]
        take = ask(call for item in hashes for call in (
            *((word, item) for word in SINGLE), *(('d.custom', item, key) for key in CUSTOMS)))
        raws = {item: dict(zip((*SINGLE, *CUSTOMS), take(len(SINGLE) + len(CUSTOMS))))
                for item in hashes}
        file, tracker = (ask(
            (f'{kind}.{word}', f'{item}:{kind}{at}') for item, raw in raws.items()
            for at in range(raw[size]) for word in words) for kind, size, words in (
                ('f', 'd.size_files', ('path', 'size_bytes')), ('t', 'd.tracker_size', TRACKER)))
        for item, raw in raws.items():
            result[item] = expected(raw, [file(2) for _ in range(raw['d.size_files'])],
                                    [tracker(len(TRACKER)) for _ in range(raw['d.tracker_size'])],
                                    cls.folder + '/session/', cls.now)
        return result

    @classmethod
    def conditions(cls):
        """Give conditions, and expressions over an item's values that say the same."""
        for pair in re.split(r'\n|\s{3,}', CONDITIONS):
            yield pair.split(' | ')
        for at, name in enumerate('size done prio fno left trackers_failed'.split() * 2):
            value = cls.items[sorted(cls.items)[at * 7]][name]
            for sign in '< <= = != >= >'.split():
                if f'{name}{sign}{value}' in ('prio<0', 'prio>3'):      # never true: refused
                    continue
                yield f'{name}{sign}{value}', f"{name} {'==' if sign == '=' else sign} {value}"

    def holding(self, code):
        """Return the hashes of the items for which an expression held at first."""
        return {item for item, values in self.items.items()
                if eval(code, {'now': self.now, 're': re, **values})}

    def matching(self, code):
        """Return those for which it held all the time."""
        return self.holding(code) - self.moved

    def test_every_state_is_there(self):
        for code, least in (('is_complete', self.count // 4), ('not is_open', self.count // 4),
                            ('is_open and not d_state and is_ghost', 10),
                            ('d_state and not is_active', self.count // 100),
                            ('is_ignored and is_private', self.count // 100)):
            with self.subTest(code):
                self.assertGreaterEqual(len(self.holding(code)), least)

    def test_fields_are_what_rtorrent_says(self):
        self.assertEqual(len(self.listed), self.count)
        self.assertEqual({*TORRENT_FIELDS} - {*self.listed[0]}, set())
        for torrent in self.listed:
            self.assertEqual((torrent.pop('free') or 0) > 0, torrent['realpath'] is not None)
            if torrent['hash'] not in self.moved:
                self.assertEqual(torrent, self.items[torrent['hash']])

    def test_conditions_give_the_right_set(self):
        self.assertGreaterEqual(len(self.found), 80)
        for text, code in self.conditions():
            with self.subTest(text):
                self.assertEqual(self.found[text] - self.moved, self.matching(code))

    def test_view_is_kept_to(self):
        found = list_torrents(self.engine, 'some', ['files'])
        self.assertEqual({torrent['hash'] for torrent in found} - self.moved,
                         self.matching('is_complete'))
        self.fails('Could not find view', list_torrents,
                   self.engine, 'nosuch', [], kind=RpcError)


class LiveTorrentsNewTest(LiveTorrentsTest):
    number, count = 1, 200              # by JSON, unless a name is not UTF-8
    hostile = [name for name in ODD_NAMES if isinstance(name, str)]


# What an `info` says >> words of the refusal
WRONG_INFOS = '''
{'pieces': b''} >> no pieces, or no usable `piece length`
{'pieces': 5} >> no pieces, or no usable `piece length`
{'piece length': -16384} >> no pieces, or no usable `piece length`
{'piece length': 0} >> no pieces, or no usable `piece length`
{'piece length': 1024} >> no pieces, or no usable `piece length`
{'piece length': b'x'} >> no pieces, or no usable `piece length`
{'length': 16385} >> its 1 pieces are not those of 16385 bytes
{'length': 0} >> its 1 pieces are not those of 0 bytes
{'length': b'1'} >> its 1 pieces are not those of 0 bytes
{'length': []} >> its 1 pieces are not those of 0 bytes
{'length': -9} >> its 1 pieces are not those of -9
{'length': -99999} >> its 1 pieces are not those of -9
{'files': []} >> its 1 pieces are not those of 0 bytes
{'files': b'x'} >> its 1 pieces are not those of 0 bytes
{'pieces': b'two of 20 bytes are it, or are they not?'} >> its 2 pieces are not those of 1 bytes
{'pieces': b'x'} >> its 0.05 pieces
{'files': [{'path': ['a'], 'length': 9}, {'path': ['b'], 'length': -1}]} >> length of the file 'b'
{'files': [{'path': 'a', 'length': 1}]} >> a file in it has no path, or no length
{'files': [{'path': [], 'length': 1}]} >> a file in it has no path, or no length
{'files': [{'path': [5], 'length': 1}]} >> a file in it has no path, or no length
{'files': [{'path': 5, 'length': 1}]} >> a file in it has no path, or no length
{'files': [{'path': {'a': 'b'}, 'length': 1}]} >> a file in it has no path, or no length
{'files': [{'path': ['a'], 'length': b'1'}]} >> a file in it has no path, or no length
{'files': [{'length': 1}]} >> a file in it has no path, or no length
{'files': [{'path': ['a']}]} >> a file in it has no path, or no length
{'files': [7, b'x']} >> a file in it has no path, or no length
{'pieces': b'', 'file tree': {'a': {}}, 'meta version': 2} >> it has no v1 part
'''
# Files, whose names stand two spaces apart, their parts between colons >> words of the refusal
WRONG_PATHS = '''
a/b >> path or length of the file 'a/|' in it is not usable
a\0b >> path or length of the file 'a|' in it is not usable
a:..:b >> path or length of the file 'a/|' in it is not usable
a:.:c >> path or length of the file 'a/|' in it is not usable
.. >> path or length of the file '|' in it is not usable
a  a >> 'a' and 'a' cannot both be files: rTorrent would abort
a  b  c  a >> 'a' and 'a' cannot both be files: rTorrent would abort
d:a:b:c  d:a.x  d:a >> 'd/a' and 'd/a/b/c' cannot both
d:a  d:a: >> 'd/a' and 'd/a' cannot both
d:a  :d::a:b >> 'd/a' and 'd/a/b' cannot both
d:a  d:a b  d:a:b:c >> 'd/a' and 'd/a/b/c' cannot both
'''


def info_of(info):
    """Return a metafile of one byte, but for what its `info` says."""
    if 'files' not in info:
        info = {'length': 1, **info}
    return bencode({'info': {'name': 'a', 'piece length': 16384, 'pieces': bytes(20), **info}})


def paths_of(names):
    """Return the files of an `info`, as names of WRONG_PATHS."""
    return [{'path': name.split(':'), 'length': 1} for name in names.split('  ')]


class MetafileTest(Folder):
    def test_metafile_is_read(self):
        content, info_hash = metafile('a é', 70000)
        found = torque.read_metafile(self.write('a.torrent', content + b'junk'))
        self.assertEqual((found.info_hash, found.name, found.main_file, found.tracker),
                         (info_hash, 'a é', 'a é', 'http://127.0.0.1:1/announce'))
        content, info_hash = metafile(
            'many', {'dir/z.nfo': 1, 'dir/b.mkv': 5, 'dir/c.txt': 2})
        found = torque.read_metafile(self.write('b.torrent', content))
        self.assertEqual((found.info_hash, found.main_file), (info_hash, 'b.mkv'))

    def refuse(self, words, content):
        self.fails(words, torque.read_metafile, self.write('x.torrent', content), kind=ValueError)

    def test_wrong_files_are_refused(self):
        good = metafile('good')[0]
        junk = (b'<!DOCTYPE html><html>|junk|i03e|i-0e|99999999999:a|d1:a|di1e1:ae|d1:ae|le|i1e|'
                b'1:a|d4:infolee|d4:info1:ae').split(b'|')
        table = {
            'empty': [b''],
            'not bencoded': [*junk, good[:-1], good[:len(good) // 2], b'\0' * 500, b'l' * 100000],
            'no `info`': [b'de', b'd1:a1:be'],
            'no usable `name`': [metafile(name)[0] for name in ('', '..', 'a/b', 'a\0b', [], 5)],
            'not in order': [good.replace(b'6:lengthi1e4:name4:good', b'4:name4:good6:lengthi1e'),
                             good.replace(b'4:name', b'4:name1:x4:name')]}
        for words, contents in table.items():
            for content in contents:
                self.refuse(words, content)
        os.mkfifo(self.folder + '/pipe')
        for path in ('pipe', '.'):
            self.fails('no regular file', torque.read_metafile, self.path(path), kind=ValueError)
        with mock.patch('torque.METAFILE_LIMIT', 10), \
                self.assertRaisesRegex(ValueError, 'larger than 10 B'):
            torque.read_metafile(self.write('x.torrent', good))

    def test_what_rtorrent_does_not_take_is_refused(self):
        for info, words in sides(WRONG_INFOS):
            self.refuse(words, info_of(ast.literal_eval(info)))
        for names, words in sides(WRONG_PATHS):
            self.refuse(words, info_of({'files': paths_of(names)}))
        self.refuse('a file in it has no path, or no length',
                    info_of({'files': [{'path': [''], 'length': 1}]}))
        for names, name in (('a::b', 'b'), (':a', 'a'), ('a:', 'a')):
            self.assertEqual(parse_metafile(info_of({'files': paths_of(names)})).main_file, name)
        for files in 'x', paths_of('b'), {}:
            found = parse_metafile(info_of({'name': 'c', 'length': 5, 'files': files}))
            self.assertEqual((found.main_file, [*found.files()]), ('c', []))
        parse_metafile(info_of({'files': paths_of('a:b  a:c  A  .a  a.b  ..b')}))
        for names in ('a  a*', 'a*  a', 'a  a:0*', 'a*  a:0', 'x  .pad:1*  .pad:1*', 'p*  p:0*'):
            files = paths_of(names.replace('*', ''))
            for file, name in zip(files, names.split('  ')):
                if '*' in name:
                    file['attr'] = 'p'
            self.refuse('cannot both be files', info_of({'files': files}))
        padding = {'path': ['.pad', '9'], 'length': 9, 'attr': 'p'}
        files = [*paths_of('a'), padding, *paths_of('b'), padding]
        self.assertEqual(parse_metafile(info_of({'files': files})).main_file, '9')

    def test_resume_that_would_end_rtorrent_is_refused(self):
        good = metafile('a', {'b': 1, 'c': 2})[0]

        def resumed(resume):
            return good[:-1] + b'17:libtorrent_resume' + bencode(resume) + b'e'
        file = {'mtime': NOW, 'priority': 1, 'completed': 1}
        for resume in ([], {'files': {}, 'trackers': []}, {'files': 'x', 'trackers': 5},
                       {'bitfield': 1, 'files': [file, file], 'uncertain_pieces.timestamp': NOW},
                       {'bitfield': b'\x80', 'files': [{}], 'peers': [5], 'trackers': {}},
                       {'trackers': {'dht://': {'enabled': 0}, 'http://x/': {'group': 32}}}):
            self.assertEqual(parse_metafile(resumed(resume)).main_file, 'c')
        for resume in ({'files': ['x']}, {'files': [file, []]}, {'files': [5]},
                       *({'trackers': {'a': {}, 'b': value}} for value in (5, 'x', [])),
                       *({'trackers': {'a': {'extra_tracker': 1, 'enabled': 1, 'group': group}}}
                         for group in ('x', -1, 33, 4294967295))):
            for content in (resumed(resume), resumed(resume).replace(b'4:info', b'4:inf_')):
                self.refuse('rTorrent would abort over its `libtorrent_resume`', content)
        self.refuse("resume`, or hang: the group of a tracker is not 0 to 32",
                    resumed({'trackers': {'a': {'group': 33}}}))

    def test_lists_in_lists_are_read(self):
        good, info_hash = metafile('a')
        for depth in (150, 199, 300, 100000):
            content = b'%s1:z%s%se' % (good[:-1], b'l' * depth, b'e' * depth)
            if depth > 200:
                self.refuse('not bencoded', content)
            else:
                self.assertEqual(parse_metafile(content).info_hash, info_hash)
        entry = b'd6:path.x%s%se' % (b'l' * 190 + b'le' * 1000, b'e' * 190)
        self.assertTrue(timed(self, 'lists', lambda: torque.bdecode(entry)))
        for wrong in (b'd1:ae', b'di1ei2ee', b'dlei2ee', b'd1:a'):
            self.fails('not bencoded', torque.bdecode, wrong, kind=ValueError)

    def test_magnet_is_read(self):
        def read(uri):
            found = parse_metafile(bencode({'magnet-uri': uri}))
            return found.info_hash, found.name, found.tracker, [*found.files()]
        item = '0123456789' * 4
        base32 = '00443214C74254B635CF84653A56D7C675BE77DF'
        self.gives(
            read, (f'magnet:?xt=urn:btih:{item}', (item, f'{item}.meta', '', [])),
            (f'magnet:?dn=x&tr=http%3A%2F%2Fa%2F&tr=b&xt=urn:btih:{item}&x=y',
             (item, f'{item}.meta', 'http://a/', [])),
            ('magnet:?xt=urn:btih:abcdefghijklmnopqrstuvwxyz234567',
             (base32, f'{base32}.meta', '', [])))
        for uri in (5, '', 'magnet:?xt=urn:btih:' + 'a' * 41, 'magnet:?xt=urn:btmh:' + 'a' * 40):
            self.refuse('no `info`', bencode({'magnet-uri': uri}))

    def test_tracker_is_the_first(self):
        for tiers, tracker in sides('''
                [['u', 'v'], ['w']] >> u
                [[], ['', 'v'], []] >> v
                [['\xe9']] >> \xe9
                ['u'] >> u
                'u' >> u
                [[], [[]]] >>
                [] >>
                [5] >>
                5 >>'''):
            tiers = bencode(ast.literal_eval(tiers))
            for announce in '', b'', 'x', 5:
                content = metafile('a', announce=announce)[0]
                content = b'd13:announce-list%s%s' % (tiers, content[1:])
                with self.subTest(tiers, announce=announce):
                    self.assertEqual(parse_metafile(content).tracker,
                                     {'x': 'x'}.get(announce, tracker))

    def assert_modest(self, content):
        """Reading or refusing it takes little more memory than it has bytes."""
        path = self.write('x.torrent', content)
        tracemalloc.start()
        with self.subTest(content[:40]), contextlib.suppress(ValueError):
            self.assertIn(torque.read_metafile(path).main_file, ('x', 'a', 'c', '0000'))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.assertLess(peak, 6 * len(content))

    def test_memory_is_bounded(self):
        size = 1 << 15
        info = b'd5:filesl%se4:name1:x12:piece lengthi16384e6:pieces20:%se'
        for unit in (b'le', b'de', b'0:', b'i1e', b'2:ab', b'd6:lengthi1e4:pathl1:aee',
                     b'd4:pathl1:a1:b1:cee'):
            files = unit * (size // len(unit))
            for content in (b'd4:info%se' % (info % (files, bytes(20))),
                            b'd1:al%se4:info%se' % (files, info % (b'', bytes(20))),
                            b'd17:libtorrent_resumed5:filesl%see4:info%se'
                            % (files, info % (b'', bytes(20)))):
                self.assert_modest(content)
        files = b''.join(b'd6:lengthi1e4:pathl4:%04dee' % number for number in range(10000))
        self.assert_modest(b'd4:info%se' % (info % (files, bytes(20))))
        entry = b'd6:lengthi1e4:pathl%see' % (b'1:a' * 30000)
        self.refuse('takes 90021 bytes to describe',
                    b'd4:info%se' % (info % (entry, bytes(20))))

    def test_fuzz_gives_value_or_error(self):
        chance, good = random.Random(7), metafile('fuzz', {'a/b': 99999})[0]
        parts = [b'd', b'l', b'e', b'i1e', b'1:a', b'i', b':', b'999:', b'4:info', b'-', b'0', b'']
        for turn in range(20000):
            if turn % 2:
                content = bytearray(good)
                for _ in range(chance.randrange(1, 6)):
                    at = chance.randrange(len(content))
                    content[at:at + chance.randrange(3)] = chance.choice(parts)
            else:
                content = b''.join(chance.choices(parts, k=chance.randrange(40)))
            with contextlib.suppress(ValueError):
                list(parse_metafile(bytes(content)).files())


# --- Data ----------------------------------------------------------------------------------------
# What cull and Move must never touch and what no crash may leave, seen from outside: rTorrent,
# torque as a process, and disks, mounts and users as the tests make them (most need root).

USED, UNSEEN = 'use|other|share', 'files'       # what a reason has to say


class Live(Folder):
    """A real rTorrent, torque as a process, disks of all kinds; judged by what is there after."""
    number = 0                          # which of RTORRENTS
    FILES = {'x': 9000, 'sub/y': 5}

    def setUp(self):
        super().setUp()
        self.command = rtorrent_command(self.number)
        self.torque = {'state_dir': self.path('state')}     # section [TORQUE], to its end
        self.prefix = []                # words before those that start torque
        self.serve('rt')

    def serve(self, name, words=(), **kwargs):
        """Start an rTorrent in a folder of its own, or start it again there; and use it."""
        server = self.ended(RTorrent(self.path(name), [*words, *self.command], **kwargs))
        self.use(server)
        return server

    def use(self, server):
        """Have an rTorrent be the one that items are loaded into and torque is pointed at."""
        self.server, self.proxy = server, server.engine.open()
        self.data = server.folder + '/data'
        self.torque['scgi_url'] = server.url

    def restart(self, number=signal.SIGTERM):
        """End rTorrent and start it again; its items come back as its session has them."""
        self.server.stop(number)
        self.serve(os.path.basename(self.server.folder))

    def proxy_of_rtorrent(self):
        """Have torque reach rTorrent through a proxy."""
        def relay(connection):
            request, _ = Server.received(connection)
            if double.refused and double.refused in request:
                double.over.wait(30)
                return
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(self.server.url)
                sock.sendall(request)
                while request:
                    request = sock.recv(65536)
                    connection.sendall(request)
        double = self.ended(Server(relay, self.server.folder + '/between.sock'))
        double.refused = b''            # what does not arrive, and has no answer
        self.torque['scgi_url'] = double.url
        return double

    def memory(self):
        """Return a folder of another file system."""
        folder = tempfile.mkdtemp(prefix='torque-', dir='/dev/shm')
        self.addCleanup(shutil.rmtree, folder)
        self.assertNotEqual(os.stat(folder).st_dev, os.stat(self.folder).st_dev)
        return folder

    def pin(self, path):
        """Have a file or folder that even root cannot change or delete."""
        self.addCleanup(subprocess.run, ['chattr', '-i', path], stderr=subprocess.DEVNULL)
        self.as_root('chattr', '+i', path)

    def serve_elsewhere(self, script):
        """Start an rTorrent in a mount namespace of its own, in which a script was run."""
        words = ['unshare', '--mount', '--propagation', 'private']
        self.as_root(*words, 'true')
        self.serve('away', [*words, 'sh', '-ec', script + '\nexec "$@"', 'sh'])

    # Items

    def another(self, url):
        """Have the ini tell of an rTorrent more."""
        self.torque.update({'job.other.handler': 'torque:EngineStats', 'job.other.schedule': '1h',
                            'job.other.scgi_url': url})

    def item(self, name, files=None, folder='', **info):
        """Write data and load its metafile; return the info-hash when it seeds."""
        files, folder = files or self.FILES, folder or self.data
        put_data(os.path.join(self.server.folder, folder), name, files)
        item = self.server.load(*metafile(name, files, **info), f'd.directory.set="{folder}"')
        self.proxy.d.start(item)
        self.wait_complete(item)
        return item

    def wait_complete(self, item):
        wait_for(lambda: self.proxy.d.complete(item) and self.proxy.d.is_active(item))

    def close(self, *items):
        for item in items:
            self.proxy.d.stop(item)
            self.proxy.d.close(item)

    def known(self, *items):
        """Return those of the items that rTorrent has."""
        return {*items} & {*self.proxy.download_list('')}

    def state(self, item):
        return [call(item) for call in (self.proxy.d.is_open, self.proxy.d.is_active,
                                        self.proxy.d.state, self.proxy.d.directory)]

    # torque

    def words(self, handler, **settings):
        """Write torque.ini; return the words that run its job t once."""
        settings = {'handler': f'torque:{handler}', 'schedule': '1h', **settings}
        lines = [f'{key} = {value}' for key, value in self.torque.items()]
        lines += [f'job.t.{key} = {value}' for key, value in settings.items()]
        return ['-c', self.write('torque.ini', '\n'.join(['[TORQUE]', *lines])), '--run-once', 't']

    def once(self, handler, *words, **settings):
        """Run a job to its end; return exit status and log."""
        words = [*self.words(handler, **settings), *words]
        status, _, log = run_torque(*words, prefix=self.prefix)
        self.assertNotIn('Traceback', log)
        return status, log

    def start(self, *words):
        """Start torque, which a test may kill."""
        return self.ended(start_torque(*words))

    def cull(self, item, *words, **settings):
        """Run a rule that culls an item; `*` stands for all."""
        return self.once('Action', *words, **{
            'action': 'cull', 'matcher': f'hash={item}', **settings})

    def move(self, item, *words, **settings):
        """Run a rule that moves an item, left out to the folder `target`."""
        return self.once('Move', *words, **{
            'target': self.path('target'), 'matcher': f'hash={item}', **settings})

    def met(self, condition):
        """Return the hashes of the items that meet a condition."""
        status, log = self.once('Action', action='log', matcher=condition, args='met {{hash}}')
        self.assertEqual(status, 0, log)
        return {*re.findall('met ([0-9A-F]{40})', log)}

    # What must be

    def assert_held(self, item, words, *runs, **settings):
        """Neither runs nor a dry run change anything of an item; all name it and the reason."""
        before = self.state(item), tree(self.folder)
        runs = runs or (self.cull, self.move)
        for run, *dry in (*((run,) for run in runs), (runs[0], '-n')):
            status, log = run(item, *dry, **settings)
            self.assertEqual((self.state(item), tree(self.folder)), before, log)
            self.assertRegex(log, f'(?i){item}.*({words}|it is closed)')
            if not dry:
                # A doubt is no failure; what the system refuses is one.
                self.assertEqual(status, int('INFO t: held back: ' not in log), log)

    def assert_culled(self, item, *gone, **settings):
        """A dry run changes nothing, a run erases an item and what paths begin with."""
        before = self.state(item), tree(self.folder)
        status, log = self.cull(item, '-n', **settings)
        self.assertEqual((status, self.state(item), tree(self.folder)), (0, *before), log)
        status, log = self.cull(item, **settings)
        left = {path: content for path, content in before[1].items() if not path.startswith(gone)}
        self.assertEqual((status, self.known(item), tree(self.folder)), (0, set(), left), log)
        for path in gone:
            self.assertFalse(os.path.exists(self.path(path)))

    def assert_shared(self, item):
        """A move does not touch data that another has, too; a cull takes the item alone."""
        self.assert_held(item, USED, self.move)
        self.assert_culled(item)

    def assert_moved(self, item, source, target, **settings):
        """A dry run changes nothing, a run moves an item and its data alone, as it is."""
        state, before = self.state(item), tree(self.folder)
        settings['target'] = self.path(target)
        status, log = self.move(item, '-n', **settings)
        self.assertEqual((status, self.state(item), tree(self.folder)), (0, state, before), log)
        status, log = self.move(item, **settings)
        for path in [*before]:
            if path.startswith(source) and not path.endswith('/mine'):
                new = f'{target}/{os.path.basename(source)}{path[len(source):]}'
                before[new] = before.pop(path)
        self.assertEqual((status, tree(self.folder)), (0, before), log)
        wait_for(lambda: self.state(item)[:3] == state[:3])
        self.assertTrue(self.proxy.d.directory(item).startswith(self.path(target)))


class LiveDataOfOthersTest(Live):
    def test_data_is_known_by_identity(self):
        bound, elsewhere = self.bind(self.data, 'bound'), self.path('elsewhere')
        put_data(self.data, 'a', self.FILES)
        within = self.bind(self.data + '/a', 'within')
        os.symlink(self.data, self.path('link'))
        os.makedirs(self.path('far/b'))         # a way over two links
        os.makedirs(self.path('hub'))
        os.symlink(self.path('hub'), self.path('far/b/one'))
        os.symlink(self.data + '/a', self.path('hub/two'))
        for name, files, folder, closed, alone in (
                ('a', None, bound, '', True), ('a', None, self.path('link'), '', True),
                ('a', None, elsewhere, self.data, True), ('a', None, bound, elsewhere, False),
                ('b', {'one/two/x': 9000}, self.path('far'), '', False),
                ('data', {'a/x': 9000, 'a/sub/y': 5, 'z': 1}, self.server.folder, '', True),
                ('sub', {'y': 5}, within, '', False)):
            with self.subTest(name, folder=folder, closed=closed):
                item = self.item('a')
                other = self.item(name, files, folder, source='other')
                if closed:              # its base path stays the old one
                    self.close(other)
                    self.proxy.d.directory.set(other, closed)
                if alone:
                    self.assert_shared(item)
                else:
                    self.assert_held(item, USED)
                self.proxy.d.erase(other)
        item = self.item('single', 9000)
        other = self.item('single', 9000, bound, source='other')
        self.assert_shared(item)
        self.item('beside', 9000)
        self.assert_culled(other, 'rt/data/single', 'bound/single')

    def test_those_that_share_data_go_together(self):
        for source in 'one', 'two':
            self.item('a', source=source)
        log = self.cull('*', '-n')[1]
        self.assertEqual(log.count('alone, its data stays: another item uses'), 1, log)
        self.assertEqual(self.cull('*')[0], 0)
        self.assertEqual(os.listdir(self.data), [])

    def test_items_of_another_rtorrent(self):
        first, item, nowhere = self.server, self.item('a'), self.path('nowhere.sock')
        self.torque['rpc_timeout'] = '0.5s'
        self.another(nowhere)
        self.assert_held(item, nowhere, self.cull)
        second = self.serve('second')
        self.another(second.url)
        other = self.item('a', folder=self.bind(first.folder + '/data', 'bound'))
        self.use(first)
        second.process.send_signal(signal.SIGSTOP)
        self.assert_held(item, second.url, self.cull)
        second.process.send_signal(signal.SIGCONT)
        self.assert_shared(item)
        self.use(second)
        self.close(other)
        self.restart()
        self.assertEqual(self.proxy.d.base_path(other), '')     # not opened since
        self.use(first)
        item = self.item('a')
        self.assert_held(item, USED, self.move)
        self.assert_culled(item, 'rt/data/a', 'bound/a', shared='delete')

    def test_folder_that_cannot_be_listed(self):
        item, other, closed = self.item('a'), self.item('b'), self.data + '/b/sub'
        os.chmod(closed, 0)
        if os.geteuid() == 0:           # root without the right to read everything
            self.prefix = ['setpriv', '--bounding-set', '-dac_override,-dac_read_search']
            self.as_root(*self.prefix, 'true')
        self.assert_held(item, closed, self.cull)
        self.assert_held(other, '', self.cull)
        os.chmod(closed, 0o700)
        self.assert_culled(item, 'rt/data/a')

    # What rTorrent calls a path is another file here

    def test_rtorrent_sees_other_files(self):
        os.makedirs(self.path('away/hidden'))
        self.serve_elsewhere('mount --bind hidden data')
        put_data(self.path('away/hidden'), 'a', self.FILES)
        item = self.item('a')
        self.assert_held(item, UNSEEN)
        self.close(item)
        self.assert_held(item, UNSEEN)
        self.torque.update({'same_files': 'yes', 'job.t.same_files': 'no'})
        self.assert_held(item, UNSEEN)
        os.rename(self.data, self.data + ' away')
        self.write(self.data + '/another', '')              # an empty folder tells nothing
        for field in 'is_ghost=yes is_ghost=no free>0 free<1 realpath=*'.split():
            self.assertEqual(self.met(field), set(), field)
        shutil.rmtree(self.data)
        os.rename(self.data + ' away', self.data)
        for key in ('same_files', 'job.t.same_files'):      # a user who knows better
            del self.torque['job.t.same_files']
            self.torque.update({'same_files': 'no', key: 'yes'})
            self.assert_culled(self.item('a'), 'away/data/a')
            self.torque['job.t.same_files'] = 'no'

    def test_another_user(self):
        """What proves that the files are the same can be read by anybody."""
        if os.geteuid():
            self.skipTest('needs root')
        item, other = self.item('a'), self.item('b')
        os.mkdir(self.path('state'))
        os.chmod(self.folder, 0o755)
        os.chmod(self.server.url, 0o777)
        for path in (self.path('state'), self.data, self.data + '/a', self.data + '/a/sub'):
            os.chown(path, 1234, 1234)
        right = '+dac_read_search'              # Python may lie in the home of root
        self.prefix = ['setpriv', '--reuid', '1234', '--regid', '1234', '--clear-groups',
                       '--inh-caps', right, '--ambient-caps', right]
        self.as_root(*self.prefix, 'true')
        self.assert_culled(item, 'rt/data/a')
        self.assert_held(other, '')             # its folders are not his

    def test_who_rtorrent_is(self):
        item = self.item('a')
        self.proxy_of_rtorrent()
        self.assert_held(item, UNSEEN, self.cull)       # who answers is no rTorrent
        self.serve('tcp', tcp=True)
        item, lock = self.item('a'), self.server.folder + '/session/rtorrent.lock'
        text = open_text(lock)
        host, pid = text.split('+')
        self.assertEqual(int(pid), self.server.process.pid)
        os.chmod(lock, 0o600)
        for wrong in ('elsewhere:+' + pid, host + '+1', ''):
            self.write(lock, wrong)
            self.assert_held(item, UNSEEN, self.cull)
        os.remove(lock)
        self.assert_held(item, UNSEEN)
        self.write(lock, text)
        self.assert_culled(item, 'tcp/data/a')

    # Where an item's data lies

    def test_items_that_are_not_open(self):
        """Their base path is old where the directory was changed, and empty after a restart."""
        items = {name: self.item(name) for name in 'abcdefg'}
        self.close(*items.values())
        for name in 'abcd':
            shutil.copytree(f'{self.data}/{name}', self.path('new', name))
            self.proxy.d.directory.set(items[name], self.path('new'))
        self.assert_culled(items['a'], 'new/a')
        self.assert_moved(items['b'], 'new/b', 'target')
        self.restart()
        self.assertEqual(self.proxy.d.base_path(items['c']), '')
        self.assert_culled(items['c'], 'new/c')
        self.assert_moved(items['d'], 'new/d', 'target')
        self.assert_culled(items['e'], 'rt/data/e')
        self.cull(items['f'], '-n')
        self.assertEqual(self.proxy.d.base_path(items['f']), '')    # a dry run opens nothing
        self.assert_moved(items['f'], 'rt/data/f', 'target')
        self.item('g', source='other')
        self.assert_shared(items['g'])

    def test_relative_paths(self):
        """They start from where rTorrent was started, which is its folder here."""
        item, other = self.item('a'), self.item('b', folder='./data')
        self.assertEqual(self.proxy.d.base_path(other), './data/b')
        self.item('near', folder='./data')
        self.assert_culled(item, 'rt/data/a')
        self.assert_culled(other, 'rt/data/b')
        item, other = self.item('c'), self.item('c', folder='./data', source='other')
        self.assert_shared(item)
        self.item('c')
        self.assert_shared(other)
        self.proxy.d.erase(item)
        other = self.item('c', folder='./data', source='other')
        self.assert_moved(other, 'rt/data/c', 'target')

    def test_session_is_not_watched(self):
        items, session = {self.item(name) for name in 'ab'}, self.server.folder + '/session'
        self.proxy.session.save()
        names = {item + '.torrent' for item in items}
        wait_for(lambda: names <= {*os.listdir(session)})
        watched = self.path('watch')
        self.bind(self.server.folder, 'watch/bound')
        os.symlink(session, watched + '/link')
        for path in (self.server.folder, session, watched):
            with self.subTest(path):
                copy = self.write(path + '/copy.torrent', metafile('a', self.FILES)[0])
                self.once('TreeWatch', path=path, remove_already_added='yes')
                self.assertEqual(os.path.exists(copy), path == session)
                self.assertLessEqual(names, {*os.listdir(session)})
        self.restart()
        self.assertEqual(self.known(*items), items)


class LiveHalvesTest(Live):
    """Whatever is cut short, no half of an item's data stays, and none is lost."""
    tries = 8
    MANY = {f'{number % 2}/{number}': 10 for number in range(1000)}

    def unfinished(self, *words):
        """Run the job while it meets nothing: only what was left unfinished is done."""
        return self.cull(NONE, *words)[1]

    def noted(self):
        """Return the notes of what is going to be removed."""
        return [name for name in os.listdir(self.path('state')) if name.startswith('removal.')]

    def killed(self, number, shown, handler, **settings):
        """Kill torque or rTorrent at some moment, but not the first time; tell whether it ran."""
        self.proxy.session.save()
        program = self.start(*self.words(handler, **settings))
        wait_for(lambda: program.seen(shown) or program.process.poll() is not None)
        began = time.monotonic()
        if number == 0:
            program.process.wait(20)
            self.most = time.monotonic() - began
            return False
        time.sleep(random.uniform(0, self.most))    # the moment itself is random
        victim = program
        if number % 2:
            victim = self.server
        victim.process.kill()
        ran = program.stop(0) != 0
        if number % 2:
            self.restart()
        return ran

    def test_cull_is_killed(self):
        self.item('keeper')
        folder, killed = self.memory(), 0
        for number in range(self.tries + 1):
            item = self.item('many', self.MANY, folder)
            killed += self.killed(number, 'cull', 'Action', action='cull', matcher=f'hash={item}')
            self.assertTrue(not self.known(item) or len(tree(folder)) == 1000)
            log = self.unfinished()
            if self.known(item):
                wait_for(lambda: not self.proxy.d.hashing(item))
                self.assertEqual(len(tree(folder)), 1000, log)
                self.assertEqual(self.cull(item)[0], 0)
            self.assertEqual((os.listdir(folder), self.noted()), ([], []), log)
        self.assertEqual(len(tree(self.data)), 2)
        self.assertTrue(killed)

    def test_rtorrent_dies_while_it_erases(self):
        """Then it has the item, and knows nothing of it but its metafile."""
        self.item('keeper')
        folder = self.memory()
        item = self.item('a', self.FILES, folder)
        double = self.proxy_of_rtorrent()
        self.torque.update(same_files='yes', rpc_timeout='2s')
        double.refused = b'd.erase'
        status, log = self.cull(item)
        self.assertEqual((status, len(self.noted())), (1, 1), log)
        self.server.stop(signal.SIGKILL)
        for ending in ('rtorrent', 'libtorrent_resume'):
            os.remove(f'{self.server.folder}/session/{item}.torrent.{ending}')
        self.serve(os.path.basename(self.server.folder))
        self.assertNotIn(folder, self.proxy.d.directory(item))
        double.refused = b''
        self.torque['scgi_url'] = double.url
        log = self.unfinished()
        self.assertIn('its item is there', log)
        self.assertIn(folder, self.proxy.d.directory(item))
        wait_for(lambda: self.proxy.d.complete(item))
        self.assertEqual((len(tree(folder)), os.listdir(self.data), self.noted()),
                         (2, ['keeper'], []), log)

    def test_several_processes_take_turns(self):
        self.item('keeper')
        items = [self.item(f'm{number}', {str(name): 10 for name in range(200)})
                 for number in range(6)]
        self.torque.update({'job.m.handler': 'torque:Move', 'job.m.schedule': 'every 0.2s',
                            'job.m.matcher': 'name=m*', 'job.m.target': self.path('target')})
        words = self.words('Action', action='cull', matcher='name=m*', limit='1',
                           schedule='every 0.2s')
        daemon = self.start(*words[:2])
        for program in [self.start(*words) for _ in range(2)]:
            program.process.wait(60)
        wait_for(lambda: not self.known(*items))
        self.assertEqual((daemon.stop(), daemon.seen('Traceback'), self.noted()), (0, [], []))
        self.assertEqual((os.listdir(self.data), tree(self.path('target'))), (['keeper'], {}))

    # Move

    def random_item(self, size=6 << 20):
        """Load an item of content that is no zeros; return its info-hash and files."""
        files = {f'sub/{number}': os.urandom(99) for number in range(50)}
        files.update({'big': os.urandom(size), 'none': b''})
        return self.item('a', files), files

    def assert_arrives(self, item, files, target, source):
        """The next run ends with whole data in one place, one without failures at the target."""
        for state in ('', '+'):
            wait_for(lambda: not self.proxy.d.hashing(item))
            self.torque['state_dir'] += state
            log = self.move(item, target=target)[1]
            place = self.proxy.d.directory(item)
            self.assertTrue(tree(place) == files, log)
            self.assertEqual(sorted(os.listdir(target) + os.listdir(source)), ['a'], log)
        self.assertEqual(place, target + '/a')
        self.wait_complete(item)

    def test_move_is_killed(self):
        item, files = self.random_item()
        places, killed = [self.data, self.memory()], 0
        for number in range(self.tries + 1):
            places.reverse()
            killed += self.killed(number, 'moving', 'Move', matcher='*', target=places[0])
            self.assertTrue(tree(self.proxy.d.directory(item)) == files)
            self.assert_arrives(item, files, *places)
        self.assertTrue(killed)


class LiveMoreThanAskedTest(Live):
    def test_limit_counts_what_was_erased(self):
        self.item('keeper')
        items = {self.item(f'a{number}') for number in range(6)}
        for number in range(6):
            self.pin(f'{self.data}/a{number}/x')
        for _ in range(2):              # nothing more is culled while that does not work
            status, log = self.cull('*', limit=2, matcher='name=a*')
            self.assertEqual((status, len(self.known(*items))), (1, 4), log)
        self.assertEqual(len(tree(self.data)), 2 + 2 + 4 * 2)
        subprocess.run(f'chattr -i {self.data}/a*/x', shell=True, check=True)
        log = self.cull(NONE)[1]
        self.assertEqual((len(self.known(*items)), len(tree(self.data))), (4, 2 + 4 * 2), log)

    def full_disk(self, name):
        """Fill a disk with items of 1 MiB; return them and the size at which two must go."""
        disk = self.disk(name, 'size=32m')
        items = [self.item(f'{name}{number}', 1 << 20, disk) for number in range(8)]
        os.link(f'{disk}/{name}0', f'{disk}/{name}0 linked')    # its space would not be freed
        self.close(*items)
        stat = os.statvfs(disk)
        return items, stat.f_bavail * stat.f_frsize + (3 << 19)

    def test_enough_is_enough(self):
        items, size = self.full_disk('disk')
        self.cull('*', '-n', until_free=size)           # and a dry run promises nothing
        self.assertEqual(len(self.known(*items)), 8)
        for _ in range(2):
            status, log = self.cull('*', until_free=size)
            self.assertEqual((status, self.known(*items)), (0, {items[0], *items[3:]}), log)

    def test_space_that_does_not_appear(self):
        items, size = self.full_disk('disk')
        with contextlib.ExitStack() as opened:
            for item in items:
                path = self.path('disk', self.proxy.d.name(item))
                opened.enter_context(open(path, 'rb'))
            for _ in range(3):
                status, log = self.cull('*', until_free=size)
                self.assertEqual((status, len(self.known(*items))), (0, 6), log)
            others, other_size = self.full_disk('other')    # another disk has promised nothing
            self.cull('*', until_free=other_size)
            self.assertEqual((len(self.known(*items)), len(self.known(*others))), (6, 6))
        for more, left in ((0, 6), (2 << 20, 4)):       # now it appears
            self.cull('*', until_free=size + more, matcher='name=disk*')
            self.assertEqual(len(self.known(*items)), left)


class LiveGhostTest(Live):
    def test_ghosts_are_those_without_data(self):
        ghosts = {self.item(name) for name in ('one', 'two')}
        for name in ('one', 'two'):
            shutil.rmtree(self.data + '/' + name)
        healthy = {self.item('healthy'), self.item('single', 9000)}
        odd = {self.item(name, 9000) for name in ('caf\udce9', 'a\rb', 'what?', '50%20')}
        odd |= {self.item(name) for name in ('m caf\udce9', 'm a\rb', 'm what?')}
        moved = self.item('moved')
        self.close(moved)
        os.makedirs(self.path('new'))
        os.rename(self.data + '/moved', self.path('new/moved'))
        self.proxy.d.directory.set(moved, self.path('new'))
        disk = self.disk('disk', 'size=8m')
        unknown = {self.item(name[:2], folder=f'{disk}/{name}') for name in ('folder', 'deep/er')}
        self.close(*unknown)
        subprocess.run(['umount', disk], check=True)
        everything = ghosts | healthy | odd | unknown | {moved}
        for restarted in (False, True):
            with self.subTest(restarted=restarted):
                self.assertEqual(self.met('is_ghost=yes'), ghosts)
                self.assertLessEqual(healthy, self.met('is_ghost=no'))
                self.assertFalse(unknown & (self.met('is_ghost=no') | self.met('free>0')))
                self.close(*ghosts, *healthy)
                self.restart()          # then there are no base paths
                self.assertEqual(self.known(*everything), everything)
        self.once('Action', action='delete', matcher='is_ghost=yes', limit=99)
        self.assertEqual(self.known(*everything), everything - ghosts)


class LiveDoubtsTest(Live):
    """Ways in which one name, path or address has stood for another."""

    def test_links_and_addresses_mislead_nobody(self):
        item = self.item('single', 9000)
        self.close(item)
        os.symlink(self.data, self.path('linked'))
        self.proxy.d.directory.set(item, self.path('linked'))
        os.symlink(self.server.url, self.path('other.sock'))    # the same rTorrent once more
        self.another(self.path('other.sock'))
        self.assert_culled(item, 'rt/data/single')

    def test_what_cannot_be_deleted(self):
        pinned, read_only = self.item('pinned'), self.item('ro')
        self.pin(self.data + '/pinned/sub')
        self.bind(self.data + '/ro', 'rt/data/ro')
        self.as_root('mount', '-o', 'remount,bind,ro', self.data + '/ro')
        for item in pinned, read_only:
            self.assert_held(item, '', self.cull)

    def test_move_onto_itself(self):
        item = self.item('bound')
        self.bind(self.data + '/bound', 'target/bound')
        self.assert_held(item, 'another item uses|exists', self.move)

    def test_paused_items_stay_paused(self):
        item = self.item('a')
        self.proxy.d.pause(item)
        self.assert_moved(item, 'rt/data/a', 'target')

    def test_other_rtorrents_that_are_not_seen_whole(self):
        item, first = self.item('a'), self.server
        self.serve_elsewhere('true')
        self.another(self.server.url)
        self.use(first)
        self.assert_held(item, 'other mounts', self.cull)
        self.another(first.url)
        self.close(self.item('b'))
        first.engine.tell([('view.filter', '', 'default', 'd.is_open=')])
        self.assert_held(item, 'hides 1', self.cull)

    def test_rtorrent_of_two_addresses(self):
        """Through a proxy it may be the same one: then nobody else has the item's data."""
        item, url = self.item('a'), self.server.url
        through = self.proxy_of_rtorrent().url
        self.torque['same_files'] = 'yes'
        for first, second in ((through, url), (url, through)):
            self.torque['scgi_url'] = first
            self.another(second)
            self.assert_held(item, 'another item may use', self.cull)

    def test_notes_that_are_none(self):
        item = self.item('a')
        for name, text in (('list', '[]'), ('null', 'null'), ('dict', '{}'), ('half', '{"ha'),
                           ('old', json.dumps({'root': '/x', 'folders': [], 'files': [],
                                               'engine': self.server.engine.address.where}))):
            self.write('state/removal.' + name, text)
        os.symlink('/etc/passwd', self.path('state/removal.link'))
        os.mkdir(self.path('state/removal.folder'))
        status, log = self.cull(item)
        self.assertEqual((status, self.known(item)), (0, set()), log)
        self.assertEqual(log.count('is no note of a removal'), 7)
        self.assertIn('removal.old is no note of a removal: it lacks hash is_active', log)


# --- Template ------------------------------------------------------------------------------------
# What may be written as args, one in a line, and what would run a value: two spaces apart.
SAFE_ARGS = """
    sh -c '... "$1"' sh {{a}}
    bash -lc -- 'echo "$@"' bash -e {{a}}
    env -u X sh -xc 'echo "$1"' python3 {{a}}
    bash -o pipefail script.sh {{a}}
    python3 script.py {{a}}
    python3 -u -W ignore x.py --name {{a}}
    python3 script.py -p {{a}}
    perl -w x.pl {{a}}
    perl -we 'print $ARGV[0]' {{a}}
    perl -Mopen -w x.pl -n {{a}}
    node -r dotenv/config x.js {{a}}
    awk -v name={{a}} '{print name}' x{{a}}
    sed -e 's/a/b/' -n {{a}}
    flock /run/lock cp -r {{a}} /x/{{a}}
    flock -n -w 5 /run/lock cp -r {{a}} /x/{{a}}
    nice -n 5 cp -r {{a}} /x/{{a}}
    nice cp {{a}} /x/{{a}}
    ionice -c3 nice -n19 nohup cp {{a}} /x/{{a}}
    timeout 60 cp {{a}} /x/{{a}}
    timeout -s KILL -k 5 1.5h cp {{a}} /x/{{a}}
    sudo -u bob cp {{a}} /x/{{a}}
    sudo -n -u bob -- A=b cp {{a}} /x/{{a}}
    env -i A=b C={{a}} cp {{a}} /x/{{a}}
    chroot --userspec=a /x cp {{a}} /x/{{a}}
    node --max-old-space-size=99 --require x x.js {{a}}
    node --no-warnings x.js {{a}}
    sudo -b --non-interactive cp {{a}} /x/{{a}}
    flock --nonblock -o /l cp {{a}} /x/{{a}}
    setsid --fork cp {{a}} /x/{{a}}
    php -r 'echo $argv[1];' {{a}}
    bash --norc x.sh {{a}}
    sed -r --quiet s/a/b/ {{a}}
    env NAME={{a}} x --name={{a}}
    notify-send "Done: {{a}}"
    notify-send --title="It is done: {{a}}"
    mkdir -p {{a}}
    cp -r {{a}} /x/{{a}}
    mv -- {{a}} "/old stuff/{{a}}"
    find /srv -name "*{{a}}*b"
    chmod +x {{a}}
"""
RUN_ARGS = """
    sh -c {{a}}  sh {{a}}  sh -c "echo {{a}}"  env bash -xc {{a}}  sh -ce "x {{a}}"  rbash -c {{a}}
    bash -c -- "x {{a}}"  bash -c -o pipefail "x {{a}}"  bash -c -o pipefail {{a}}  /bin/dash x{{a}}
    mksh -c {{a}}  yash -c {{a}}  busybox sh -c {{a}}  bash -o posix {{a}}  bash --rcfile x {{a}}
    ssh nas {{a}}  ssh h ls {{a}}  su -c "x {{a}}" root  su {{a}}  rsh h {{a}}  watch ls {{a}}
    xargs -a {{a}} rm  tmux new {{a}}  screen -dm {{a}}  parallel {{a}}  at {{a}}  nice watch {{a}}
    runuser -u me -c {{a}}  script -c {{a}} x  flock /x -c {{a}}  flock -c "x {{a}}"  sudo {{a}}
    timeout 60 {{a}}  timeout -s KILL -k 5 1.5h {{a}}  nice -n 19 {{a}}  nice -19 {{a}}
    sudo -u bob {{a}}  sudo -u bob -- {{a}}  sudo A=b {{a}}  doas -u x {{a}}  chroot /x {{a}}
    flock /l {{a}}  flock -n /l {{a}}  flock -w 5 /l {{a}}  env -u A {{a}}  env A=b {{a}}
    env -S A={{a}}  env -SA={{a}}  nice timeout 60 {{a}}  busybox timeout 60 {{a}}
    node --require x {{a}}  node -r x {{a}}  ruby -r x {{a}}  lua -l x {{a}}
    env -S "sh -c {{a}}"  env -S {{a}}  env {{a}}  nohup {{a}}  find . -exec sh -c {{a}}
    python3 -c {{a}}  python3 {{a}}  python3.11 -Bc {{a}}  python3 -m {{a}}  python3 -W x {{a}}
    perl {{a}}  perl -E {{a}}  perl -e{{a}}  perl5.36 -e {{a}}  perl -ne {{a}}  perl -e x -e {{a}}
    perl -ne print {{a}}  perl -pi.bak -e x -- y {{a}}  perl -w0777ne x {{a}}  perl -n x.pl {{a}}
    perl -I lib -M{{a}} x.pl  ruby -e {{a}}  ruby -r {{a}} x  node -p {{a}}  node --eval {{a}}
    node --eval={{a}}  node -r x -e {{a}}  php -r {{a}}  php8.2 -d x=1 -r {{a}}  lua5.4 -e {{a}}
    tclsh8.6 {{a}}  awk {{a}}  gawk -f {{a}}  mawk x{{a}}  awk -v a=b {{a}}  sed {{a}}  sed -e {{a}}
    sh -v {{a}}  bash -v {{a}}  /bin/sh -v {{a}}/x.sh  python3 -v {{a}}  env -v {{a}}  sed -v {{a}}
    sed s/a/b/ x -e {{a}}  sed -i -f {{a}} x  x -c "y {{a}}"  x -e "y {{a}}"  x -E "y {{a}}"
    x -r "y {{a}}"  x -p "y {{a}}"  x --eval "y {{a}}"  x --command "y {{a}}"  x -lc "y {{a}}"
    x -ne "y {{a}}"  x -e{{a}}  x -lc{{a}}  x --eval={{a}}  x --command="y {{a}}"  x "-ey {{a}}"
"""
SHELL_ARGS = ["""perl -E 'say "{{a}}"'""", """sh -c 'rm "{{a}}"'""", """x '"{{a}}"'""",
              '''x "'{{a}}'"''', *(f"x 'y{mark} {{{{a}}}}'" for mark in ';|&$()<>{}`\\\n\r'),
              """php -r 'echo "{{a}}";'""", "awk '{print {{a}}}'", """python3 -c 'f("{{a}}")'"""]


class TemplateTest(Case):
    refuse = FilterTest.refuse

    def test_values_are_put_in(self):
        values = {'name': 'A.b', 'ratio': 1.5, 'size': 2048, 'tags': {'y', 'x'}, 'list': ['b', 'a'],
                  'none': None, 'yes': True, 'when': NOW, 'path': '/a/b.c.iso'}
        values['map'], clock = {'kind': 'tv'}, time.strftime('%F %T', time.localtime(NOW))
        for text, wanted in sides('''
                x >> x
                {{name}} {{ item.name }} {{d.name}} >> A.b A.b A.b
                {{none}} >>
                {{tags}} {{list}} {{yes}} {{ratio}} >> x y b a 1 1.5
                {{name|lower|upper}} >> A.B
                {{path|basename}} {{path|dirname}} {{path|stem}} >> b.c.iso /a b.c
                {{path|pathbase}}{{path|h.pathname}} >> b.c.isob.c
                {{size|size}} >> 2 KiB
                {{size | sz}} >> 2 KiB
                {{3600|duration}} >> 1h
                {{none|size}} >>
                {{0|date}} >>
                {{none|default('a b')|upper}} >> A B
                {{none|default}} >>
                {{0|default(1)}} >> 0
                {{name.replace('.', ' ').title()}} >> A B
                {{-1}} >> -1
                {{map.kind}}{{map.x}}{{none.kind}} >> tv
                {{map.get('x', 'no')}} >> no
                {{none or 'x'}} >> x
                }} # } >> }} # }'''):
            with self.subTest(text):
                self.assertEqual(Template(text).render(values), wanted)
        for text, wanted in (('{{when|date}}', clock), ('', ''), ('{{# no }}{# no\n #}y', 'y')):
            self.assertEqual(Template(text).render(values), wanted)

    def test_conditions_choose(self):
        values = {'a': 2, 'b': None, 'flags': {'TV'}, 'path': '/x/music/', 'kind': 'tv', 'e': []}
        yes = """a; not b; a > 1; 1 < a <= 2; 'TV' in flags; '/music/' in path; 'x' not in b; True;
            kind in ('tv', 'film'); item.kind == 'tv':; (a or b) and e == []; a > -1; a"""
        no = """b; e; a == 2 and b; 'TV' not in flags; b > 1; b < 1; a < 'x'; 'x' in b; None;
            e or b; a != 2""".split(';')
        for wanted, code in [('1', code) for code in yes.split(';')] + [('', code) for code in no]:
            for text in ('{{if %s}}1{{endif}}', '{%% if %s %%}1{%%- else -%%}{%% endif %%}'):
                with self.subTest(text % code):
                    self.assertEqual(Template(text % code).render(values), wanted)
        template = Template('{{if a}}{{if b}}1{{else}}2{{endif}}{{elif c}}3{{endif}}')
        for a, c, wanted in ((1, 0, '2'), (0, 1, '3'), (0, 0, '')):
            self.assertEqual(template.render({'a': a, 'b': 0, 'c': c}), wanted)

    def test_names_are_known_early(self):
        self.assertEqual(Template("{{item.a|default('x')}}{{if b.c and a}}{{d}}{{endif}}").names,
                         ('a', 'b', 'd'))
        self.refuse(lambda text: Template(text, known=['label']), {
            "there is no 'lable' here; did you mean 'label'": '{{lable}}',
            '{label} is plain text; write {{label}}': 'd.x={label}'})
        for text in '{name} {x} ${name} {} { {a,b} {print} {names} }} {'.split():
            self.gives(Template(text, known=['label']).render, ({}, text))
        for text in ('x{{a}}', '{{b|date}}', '{{b.lower}}'):
            with self.assertRaisesRegex(LoggableError, "^template .*('a'|'get'|range|large)"):
                Template(text).render({'b': 10 ** 30})

    def test_bad_templates_are_refused(self):
        table = {
            'is not possible; allowed are names': """a.__class__;a[0];a();a + 1;__import__("os");
            lambda: 1;[x for x in y];a if b else c;f"{a}";a|nosuch;a.format(b);{1: 2} ;
            (a := 1);a.get(b=1)""",
            'does not take 1 argument': 'a|lower(1);a|replace(1)',
            "no expression ... e.g. label, label|default('x')":
            f";-a;+a;a is b;a b;a|;1e999|duration;{'1' * 400};{'not ' * 74}("}
        for text in ('x {{%s}} y', '{{if %s}}y{{endif}}', '{%% if %s %%}y{%% endif %%}'):
            for word, codes in table.items():
                self.refuse(Template, {word: [text % code for code in codes.split(';')]})
        self.refuse(Template, {
            "'a{{b}}c{{d+1}} <-- here e' ... BinOp": 'a{{b}}c{{d+1}}e',
            'not closed': '{{a  {% if  {# x',
            '{label} is plain text; write {{label}}':
            '/mv/{label}  {{name}}{label}  a\n{label}{x}',
            '{item.name|lower} is plain text; write {{item.name|lower}}': 'x={item.name|lower}',
            '{ name } is plain': ['{ name }'],
            'no endif': '{{if a}}x', 'endif without if': '{{endif}}', 'else without': 'x{{else}}',
            'elif after else': '{{if a}}{{else}}{{elif b}}{{endif}}', 'NUL': 'a\0',
            'no expression': ['{{if}}{{endif}}', '{% for a in b %}'],
            'too deep; allowed are 50': ['{{if a}}' * 99]})

    def test_documented_commands_work(self):
        sorting = """{{# set download path
            }}{{if '/music/' in pathname}}{{# add metafile basename to path
                }}d.directory_base.set="/sorted/{{relpath}}/{{pathname|h.pathname}}"{{#
            }}{{elif traits.kind == 'tv'}}{{# store TV content into separate show folders
                }}d.directory.set="/sorted/{{relpath}}/""" """{{traits.get('show', '_UNKNOWN')\
.replace('.',' ').title()}}"{{#
            }}{{else}}{{# just use the relative metafile location
                }}d.directory.set="/sorted/{{relpath}}"{{#
            }}{{endif}}"""
        d_set = 'd.directory.set="/sorted/a, \\"b\\"'
        target = 'd.custom.set=targetdir,/done/{{label}}/{{relpath}}'
        tv = {'label': 'TV', 'relpath': 'a, "b"', 'flags': {'TV'}, 'pathname': '/w/x.y.torrent',
              'traits': {'kind': 'tv', 'show': 'Pioneer.one'}}
        music = dict(tv, pathname='/w/music/x.y.torrent', flags=[])
        for text, row, wanted in (
                ('{{# set target path\n    }}' + target, tv,
                 'd.custom.set="targetdir","/done/TV/a, \\"b\\""'),
                ('{# set target path\n    #}' + target, dict(tv, relpath='b'),
                 'd.custom.set="targetdir","/done/TV/b"'),
                ("\n{% if 'TV' in flags %}d.custom1.set=TV{% endif %}\n", tv, 'd.custom1.set=TV'),
                ("{{if 'TV' in flags}}d.custom1.set=TV{{endif}}", music, ''),
                ('f.multicall=*.nfo,f.priority.set=2', tv, 'f.multicall=*.nfo,f.priority.set=2'),
                (sorting, tv, d_set + '/Pioneer One"'),
                (sorting, dict(tv, traits={'kind': 'tv'}), d_set + '/_Unknown"'),
                (sorting, music, 'd.directory_base.set="/sorted/a, \\"b\\"/x.y"'),
                (sorting, dict(tv, traits={}), d_set + '"'),
                ('d.x.set={{label}},"q;,{{label}}", b c \n\n d.y=;print=$d.name=', tv,
                 'd.x.set="TV","q;,TV","b c" ; d.y= ; print=$d.name='),
                ('d.x.set={{label}},$d.name=,', tv, 'd.x.set="TV","$d.name=",""')):
            with self.subTest(text, row=row):
                self.assertEqual(CommandTemplate(text, known=tv).render(row), wanted)

    def test_bad_commands_are_refused(self):
        self.refuse(CommandTemplate, {
            'is not a command; allowed is name=argument': '{{a}}  d.start  {{a}}.set=1  {{a}}=1',
            "'oops' is not a command": '{{if a}}d.x=1{{else}}oops{{endif}}',
            'd. is missing before stop; write d.stop=':
            'stop=  d.x= ; stop =  {{if a}}d.x=1{{else}}stop={{endif}}',
            'write d.directory.set': 'directory.set=/x  directory.set={{a}}',
            'write d.custom1': 'custom1.set={{a}}  custom1.set=a',
            'write d.try_close': 'try_close=',
            'might run the value ... d.custom.set': """branch=d.x=,{{a}}  f.multicall=*,f.x={{a}}
            d.multicall2=,main,{{a}}  schedule2=a,0,0,{{a}}  method.set={{a}}""",
            'a value beside ... words and "..."': """d.x=(cat,{{a}})  d.x=$d.y={{a}}  d.x="{{a}}
            d.x={b,{{a}}  d.x="a"{{a}}""", 'would run; ... "$1"':
            'execute=sh,-c,"rm {{a}}"  execute.nothrow.bg=/bin/bash,-ec,{{a}}',
            'may become a shell; allowed are words': '''execute.throw=$cat=sh,-c,{{a}}
            execute="$cat=sh",-c,{{a}}  execute.nothrow.bg=cp,{{a}}, $d.name=''',
            'may be run; ... "$1"': 'execute=x,"y;{{a}}"',
            'depends on a value': 'execute={{a}},x', 'makes rTorrent abort ... f.multicall':
            '''f.path=  d.x=$f.path=  d.x=(f.path)  print="$f.path="  branch=d.x=,f.path=
            branch=d.x=,f.multicall=*,f.path=  d.multicall2=main,"f.path="  t.multicall=,f.path=
            d.y= ; f.path=  branch=d.x=,"branch=d.y=,\\"f.path=\\""  d.x=(cat,(f.path,x))
            d.x=a,"$cat=$f.path="  schedule2=a,0,0,"f.path="  f.priority.set={{a}}'''})
        for text in '''f.multicall=*,f.path= d.x=k,f.path print=f.path cat=f.iso view.add=x
                directory.default.set=/x start_tied= close_untied= load.normal=/x/f.iso
                d.multicall2=main,"f.multicall=*,f.path="'''.split():
            self.gives(CommandTemplate(text).render, ({}, text))

    def test_hostile_text_stays_one_argument(self):
        old = CommandTemplate('d.set_custom=k,{{name}};f.multicall=*.jpg,f.set_priority=2;'
                              'f.multicall=*,f.set_create_queued=0')
        self.assertEqual(old.commands({'name': 'd.set_custom='}), [
            'd.custom.set="k","d.set_custom="', 'f.multicall=*.jpg,f.priority.set=2',
            'f.multicall=*,f.set_create_queued=0'])
        command = CommandTemplate('d.custom.set=k,{{name}};d.y="/a/{{name}}/b"')
        for text in ('$d.erase=', 'x\\"', '"; d.erase="', ',d.erase=', 'a\nb'):
            inner = text.replace('\\', '\\\\').replace('"', '\\"')
            whole = f'"{inner}"'
            if text.startswith('$'):
                whole = f'(cat,{{{whole}}})'
            self.assertEqual(command.commands({'name': text}),
                             [f'd.custom.set="k",{whole}', f'd.y="/a/{inner}/b"'])

    def test_external_commands_are_lists(self):
        args = ArgsTemplate("mv -- '{{a|default(\"x y\")}}' /{{ b }}/ {{if c}}-n {{c}}{{endif}}")
        self.assertEqual(args.render({'a': '', 'b': 'p q', 'c': 0}), ['mv', '--', 'x y', '/p q/'])
        self.assertEqual(args.render({'a': 'i', 'b': '', 'c': 2})[-2:], ['-n', '2'])
        with self.assertRaisesRegex(LoggableError, "'-rf' would be an option of 'sh'; write --"):
            ArgsTemplate("sh -c 'echo $1' sh {{a}}").render({'a': '-rf'})
        self.refuse(ArgsTemplate, {
            'the program is missing': [''], 'depends on a value': '{{a}} b  /x/{{a}}.sh',
            'No closing ... words, "..."': 'x "a'})

    def test_values_are_never_run(self):
        for args in SAFE_ARGS.strip().splitlines():
            with self.subTest(args):
                self.assertIn('b', ArgsTemplate(args.strip()).render({'a': 'b'})[-1])
        way = """allowed is sh -c '... "$1"' sh {{name}}"""
        self.refuse(ArgsTemplate, {
            'a value that a shell or the like would run; ' + way: RUN_ARGS.strip(),
            'a value beside quotes ; | & $ ( < or the like may be run; ' + way: SHELL_ARGS})

    def test_no_value_leads_out_of_its_folder(self):
        for make, text in ((Template, '/mv/{{a}}'), (Template, '/mv/{{a}}/{{b}}'),
                           (Template, '{{b}}/x{{# }}/{{a}}'), (Template, '/mv/{{c}}{{c}}{{a}}'),
                           (CommandTemplate, 'd.directory.set=/mv/{{a}}'),
                           (CommandTemplate, 'd.custom.set=dir,"/mv/{{b}}/{{a}}"'),
                           (ArgsTemplate, 'mkdir -p /mv/{{b}}/{{a}}')):
            template = make(text)
            for a in '.. ../etc ../../etc a/../.. /.. x/..'.split():
                self.fails(f"template |{a}' would lead out of the folder", template.render,
                           {'a': a, 'b': 'b', 'c': ''})
            for a in ('', 'a/b', '...', 'a..', '..a/b', '/etc', 'a b'):
                self.assertIn(f'/{a}', str(template.render({'a': a, 'b': 'b', 'c': ''})))
        self.fails("'..' would lead out", Template('/x/{{a}}{{a}}').render, {'a': '.'})
        for text in ('{{a}}', '{{a}}/x', 'print {{a}}', '/a/../{{b}}'):
            Template(text).render({'a': '../x', 'b': 'y'})

    def test_nul_in_a_value_is_held_back(self):
        for make, text in ((Template, '/mv/{{a}}'), (CommandTemplate, 'd.custom1.set={{a}}'),
                           (ArgsTemplate, 'mkdir {{a}}'), (Template, '{{if b}}x{{else}}{{a}}')):
            template = make(text + '{{endif}}' * ('{{if' in text))
            for a in ('..\0', '\0', 'x\0/../y', ['b', '..\0']):
                self.fails('a value holds a NUL', template.render, {'a': a, 'b': 0},
                           kind=torque.HeldBack)
        self.assertEqual(Template('{{if b}}x{{else}}{{a}}{{endif}}').render({'a': '\0', 'b': 1}),
                         'x')

    def test_random_templates_render_or_are_refused(self):
        rng, rendered, values = random.Random(5), 0, {'a': '$x"', 'b': {'c': 2}}
        words = [*'ab()[].,|"\\=;\n$1<-é#f\0', '9' * 9, ' not ', ' and ', '{{if ', 'sh -c ', *"""
                 {{ }} {% %} {# #} {{else}} {{endif}} {{a}} {{b.c}} in |lower 'x' d.x.set= ==
                 lambda: __class__ execute= {{a|default("x")}} ** := if""".split(), '{{if a}}']
        for kind in (Template, CommandTemplate, ArgsTemplate):
            for _ in range(7000):
                text = ''.join(rng.choice(words) for _ in range(rng.randint(1, 9)))
                rendered += timed(self, text, lambda: kind(text).render(values))
        self.assertGreater(rendered, 1000)


# --- Jobs: base and figures ----------------------------------------------------------------------

class EngineStatsTest(Folder):
    def test_line_tells_the_state(self):
        for stats, line in (
                (('host:4711', '0.9.8/0.13.8', 273600, 1258291, 2097152, 0, 317440, 0,
                  *[0] * 5, {'main': 1204, 'active': 31}, 0.0021),
                 'host:4711 rTorrent 0.9.8/0.13.8 up 3d 4h; 1204 torrents, 31 active; '
                 'up 1.2 MiB/s of 2.0 MiB, down 310 KiB/s; rpc 2.1 ms'),
                (('host:1', '0.16', *[None] * 11, {'main': None, 'active': None}, 0.1),
                 'host:1 rTorrent 0.16; ? torrents, ? active; up ?, down ?; rpc 100.0 ms')):
            engine = types.SimpleNamespace(stats=lambda stats=stats: torque.Stats(*stats))
            make_job(torque.EngineStats, engine, self.folder).run()
            self.assertEqual(self.lines.pop(), f'INFO t: {line}')


class LiveJobTest(Folder):
    def test_job_lists_torrents_and_acts(self):
        daemon = self.ended(RTorrent(self.path('rt')))
        for name, size in ('one', 1), ('two', 70000):
            daemon.load(*metafile(name, size))
        job = torque.Job(Settings(engine=daemon.engine))
        self.assertEqual(len(job.torrents()), 2)
        self.assertEqual(job.torrents('size>1k OR name=x', view='started'), [])
        for fields in 'size, done', ['size', 'done']:
            with self.subTest(fields=fields):
                row, = job.torrents('size>1k', fields)
                self.assertEqual((row['name'], row['size'], row.done), ('two', 70000, 0))
        job.act('d.custom1.set', row['hash'], 'seen')
        self.assertEqual(len(job.torrents('label=seen')), 1)
        with self.assertRaises(HashNotFound):
            job.act('d.custom1.set', 'A' * 40, 'seen')
        for wrong in ('siz>1',), ('', 'siz'):
            self.refused("'siz'", job.torrents, *wrong)


class LineProtocolTest(Case):
    def test_names_and_values_are_escaped(self):
        line = torque.influx_line('a b,c', {'k=1': 'v w,x'}, {'f g': 'q"\\\n', 'i': 2 ** 40,
                                                              'b': True}, 1.5)
        self.assertEqual(line, 'a\\ b\\,c,k\\=1=v\\ w\\,x f\\ g="q\\"\\\\ ",i=1099511627776i,b=True'
                               ' 1500')
        self.gives(torque.influx_line, ('s', {'a': '', 'b': ' \n', 'c': 'x'}, {'v': 1}, 1,
                                        's,c=x v=1i 1000'))

    def test_tags_are_parsed(self):
        self.assertEqual(torque.parse_pairs('dc=home, rack=a 1'), {'dc': 'home', 'rack': 'a 1'})
        for text in ('dc', 'dc=', '=x', 'c,a=b', ', ,x'):
            self.refused('is not understood; allowed is name=value', torque.parse_pairs, text)


class InfluxDBTest(Folder):
    """Against a web server that answers (status, text, a header) in turn, then 204.

    An answer may also be a function of the body.
    """

    def job(self, *answers, **settings):
        answers = iter(answers)

        def answer(connection, head, body):
            told = next(answers, (204, ''))
            if callable(told):
                told = told(body)
            status, text, *header = told
            connection.sendall(page(text.encode(), f'{status} Said', *header))
        self.server = self.ended(WebServer(answer))
        engine = types.SimpleNamespace(stats=lambda: torque.Stats(
            'box:1', '0.9.8/0.13.8', 5, 1, 2, 3, 4, 5, 6, 7, 8, None, 9, {'main': 3}, 0.001))
        engine = settings.pop('engine', engine)
        return make_job(torque.InfluxDB, engine, self.folder,
                        **{'url': self.server.url, **settings})

    def test_request_has_documented_form(self):
        for settings, path, auth in (
                ({}, '/write?db=torque&precision=ms', []),
                ({'user': 'me', 'password': 'p w'}, '/write?db=torque&precision=ms',
                 ['Basic bWU6cCB3']),
                ({'org': 'my org', 'bucket': 'b', 'token': 'T'},
                 '/api/v2/write?org=my+org&bucket=b&precision=ms', ['Token T']),
                ({'api': '2', 'token': 'T'}, '/api/v2/write?org=&bucket=torque&precision=ms',
                 ['Token T']),
                ({'api': '3', 'token_file': self.write('token', 'T3\n')},
                 '/api/v3/write_lp?db=torque&precision=millisecond', ['Bearer T3'])):
            with self.subTest(settings=settings):
                self.job(**settings).run()
                (head, _), = self.server.requests
                self.assertTrue(head.startswith(f'POST {path} HTTP/1.1\r\n'), head)
                self.assertEqual(re.findall(r'Authorization: (.*)\r', head), auth)
                self.assertIn('Content-Type: text/plain', head)
                self.assertRegex(self.sent()[0], (
                    r'^rtorrent,host=box engine_id="box:1",version="0.9.8/0.13.8",uptime=5i,'
                    r'up_rate=1i,up_limit=2i,up_total=3i,down_rate=4i,down_limit=5i,down_total=6i,'
                    r'open_sockets=7i,max_open_sockets=8i,max_open_files=9i,rpc_time=0.001 '
                    r'\d{13}$'))

    def sent(self):
        """Return the lines of the last request."""
        return self.server.requests[-1][1].decode().splitlines()

    def test_points_wait_for_the_server(self):
        job = self.job((503, 'busy'), (401, 'who?'), (404, 'database not found'),
                       series_host='', buffer='5')
        self.fails('503|2 points kept, 0 dropped', job.run)
        self.fails('401|4 points kept', job.run)
        self.fails('''404|-execute 'CREATE DATABASE "torque"'; 5 points kept, 1 dropped''', job.run)
        job.run()
        times = [int(line.rsplit(' ', 1)[1]) for line in self.sent()]
        self.assertEqual((len(times), times, job.points), (7, sorted(times), []))

    def test_one_series_spoils_no_other(self):
        for status, key in (500, 'error'), (400, 'error'), (422, 'message'):
            text = json.dumps({key: f'field type conflict: "{50 * "long "}" end'})

            def answer(body, refusal=(status, text)):
                if b'rtorrent,' in body:
                    return refusal
                return 204, ''
            job = self.job(*[answer] * 9, disk_path='')
            self.fails(f"1 point of rtorrent refused and dropped: HTTP {status} Said 'fi| end'",
                       job.run)
            self.assertEqual((len(self.server.requests), job.points), (4, []))

    def test_server_that_asks_to_wait_is_left_alone(self):
        job = self.job(*[(429, '', f'Retry-After: {text}') for text in ('7', '999999', 'soon')])
        for passed, requests, words in (
                (0, 1, 'HTTP 429'), (6, 1, 'the server has asked to wait'), (2, 2, 'HTTP 429'),
                (3590, 2, 'asked to wait'), (11, 3, 'HTTP 429'), (0, 4, '')):
            job.retry_at -= passed
            if words:
                self.fails(words, job.run)
            else:
                job.run()
            self.assertEqual(len(self.server.requests), requests)

    def test_nothing_is_small_enough(self):
        self.write('t.points', ''.join(f's v={number}i {number}\n' for number in range(9000)))
        job = self.job(*[(413, '\x1b[31mno')] * 50, series='')
        said = str(self.fails("HTTP 413 Said '\\x1b[31mno'|points kept", job.run))
        self.assertEqual((said.count('HTTP 413'), self.lines), (1, []))   # a port may hold 413
        self.assertLess(len(self.server.requests), 20)
        self.assertGreater(len(job.points), 9000)

    def test_backlog_survives_restart(self):
        job = self.job(*[(500, '')] * 4, series_host='')
        file = self.path('t.points')
        for passed, expected in (0, 2), (0, 2), (60, 6):        # it is saved within a minute
            job.saved_at -= passed
            self.fails('', job.run)
            self.assertEqual(open_text(file).count('\n'), expected)
        self.fails('', job.run)
        job.cleanup()
        self.assertEqual(os.stat(file).st_mode & 0o777, 0o600)
        self.job(dry_run=True).run()
        self.job(alone=True, series_host='').run()      # neither touches what another keeps
        self.assertEqual(len(self.sent()), 2)
        self.job(series_host='').run()
        self.assertEqual(self.sent()[:8], job.points)
        self.assertEqual(os.listdir(self.folder), [])

    def test_run_that_is_cut_short_loses_nothing(self):
        asked, answer = threading.Event(), threading.Event()
        self.addCleanup(answer.set)

        def hang(body):
            asked.set()
            answer.wait()
            return 204, ''
        self.write('t.points', 's v=1i 1\n')
        job = self.job(hang, series_host='')
        run = threading.Thread(target=job.run, daemon=True)
        run.start()
        asked.wait(20)
        job.end_run()
        kept = open_text(self.path('t.points')).splitlines()
        self.assertEqual((kept[0], kept), ('s v=1i 1', self.sent()))
        answer.set()                            # it comes through, while the end is near
        run.join(20)
        self.assertEqual((job.points, os.listdir(self.folder)), ([], []))

    def test_run_by_hand_says_what_it_sent(self):
        for alone, level in (True, 'INFO'), (False, 'DEBUG'):
            self.job(alone=alone, disk_path='').run()
            self.assertEqual(self.lines.pop(), f'{level} t: 3 points sent')
            self.assertEqual(self.lines, [])

    def test_dry_run_sends_nothing(self):
        self.job(dry_run=True).run()
        self.assertEqual(self.server.requests, [])
        self.assertTrue(self.logged('dry run, not done: sending', 'rtorrent,host=box'))

    def test_host_is_pushed_without_rtorrent(self):
        engine = types.SimpleNamespace(stats=mock.Mock(side_effect=Unreachable('gone')))
        self.fails('gone', self.job(engine=engine, disk_path=f'/no/where:{self.folder}').run)
        host, disk = self.sent()
        self.assertRegex(host, r'^host,host=\S+ load1=[\d.]+,.*memory_total=\d+i,.*net_sent=')
        self.assertRegex(disk, rf'^host,disk={self.folder},host=\S+ disk_total=\d+i,disk_free=')

    def test_network_is_what_devices_carry(self):
        names = 'lo eth0 docker0 wlan0 tun0'.split()
        rows = {name: [str(number)] * 16 for number, name in enumerate(names)}
        for devices, total in (('eth0', 'wlan0'), 1 + 3), ((), 1 + 2 + 3 + 4):
            def exists(path, devices=devices):
                return path in [f'/sys/class/net/{name}/device' for name in devices]
            with self.subTest(devices), mock.patch('os.path.exists', exists), \
                    mock.patch('torque.proc_rows', return_value={'Inter-| Receive': [], **rows}):
                figures = torque.host_figures()
                self.assertEqual((figures['net_received'], figures['net_sent']), (total, total))

    def test_wrong_settings_are_refused(self):
        for rest in '''/write?db=torque /write /api/v2/write?org=hunter2 /?u=hunter2 ?db=x /#x
                /query /orgs/1f /api/v3/'''.split():
            told = self.refused('more than the base URL; write https://h:1/in, and ', self.job,
                                url='https://h:1/in' + rest)
            self.assertNotIn('hunter2', str(told))
        for url in 'http://h', 'http://h:8428/', 'http://h/api/flux', 'http://write/writers/x':
            self.assertEqual(self.job(url=url).config.url, url.rstrip('/'))
        for words, settings in {
                'nothing to push': {'series': '', 'series_host': ''},
                "'#x' would begin a comment": {'series_host': '#x'},
                'no web address': {'url': 'ftp://x'}, 'without user': {'url': 'http://me:pw@x'},
                'allowed are 1 2 3': {'api': '4'},
                'holds a blank, a': {'token': 'a\nsesame'}}.items():
            self.refused(words, self.job, **settings)
        self.fails('nobody listens there', self.job(url=f'http://127.0.0.1:{free_port()}').run)
        silent = self.ended(Server(lambda connection: silent.over.wait()))
        closes = self.ended(Server(lambda connection: connection.recv(99999)))
        for server, timeout, words in ((silent, '0.1s', 'no answer in 0.1 s: busy, hung'),
                                       (closes, '9s', 'the connection was closed')):
            job = self.job(url=f'http://127.0.0.1:{server.port}', timeout=timeout)
            self.assertNotIn('scgi://', str(self.fails(words, job.run)))
        self.fails('No such file', self.job(token_file='/nowhere/token').run)
        token = self.write('token', 'a sesame')
        self.fails(f'token_file {token}: line 1 holds a blank', self.job(token_file=token).run)
        self.fails("disk_path '/no/where': No such", self.job(disk_path='/no/where', series='').run)
        job = self.job((401, 'unauthorized'), user='me', password='sesame')
        error = self.fails('', job.run)
        self.assertNotIn('sesame', f'{error} {job.config!r} {self.lines}')


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
        self.server = InfluxServer(self.path('influx'))
        self.addCleanup(lambda: self.server.stop())
        self.server.query('CREATE DATABASE torque')

    def job(self, engine=None, **settings):
        return make_job(torque.InfluxDB, engine, self.path('state'), url=self.server.url,
                        tags='odd tag=a b,x=y', **settings)

    def test_values_are_read_back(self):
        daemon = self.ended(RTorrent(self.path('rt')))
        daemon.load(*metafile('some data'))
        stats = daemon.engine.stats()
        engine = types.SimpleNamespace(stats=lambda: stats)
        self.job(engine=engine, gzip='yes').run()
        row, = self.server.query('SELECT * FROM rtorrent')
        self.assertEqual((row['x'], row['odd tag']), ('y', 'a b'))
        for name, value in stats._asdict().items():
            if name != 'views' and value is not None:
                self.assertEqual(row[name], value, name)
        views, = self.server.query('SELECT * FROM rtorrent_views')
        self.assertEqual((views['main'], views['stopped'], views['seeding']), (1, 1, 0))
        host = self.server.query('SELECT * FROM host')
        self.assertEqual([entry['disk_total'] for entry in host if entry['disk']],
                         [shutil.disk_usage(os.path.expanduser('~')).total])

    def test_dashboard_finds_its_figures(self):
        daemon = self.ended(RTorrent(self.path('rt')))
        self.job(engine=daemon.engine).run()
        for panel in torque.dashboard('influxdb')['panels']:
            query = panel['targets'][0]['query']
            row, = self.server.query(query.replace('$timeFilter', 'time > now() - 50m')
                                     .replace('$__interval', '1h'))
            names = {*re.findall(r' AS (\w+)', query)}
            self.assertTrue(names)
            # The free space of any disk; 0.9.8 does not tell of open files.
            self.assertLessEqual(names - {'files'}, {name for name in row if row[name] is not None})

    def test_refused_points_block_nothing(self):
        job = self.job(series='', disk_path='')
        job.points = ['host v="text" 1', 'host v=1i 2', 'other v=1i 3']
        self.fails('points of host |"v" on |dropped=1', job.run)
        self.assertEqual(len(self.server.query('SELECT * FROM other')), 1)
        self.server.query('DROP DATABASE torque')
        self.fails('database not found|CREATE | kept', job.run)

    def test_too_large_is_split(self):
        self.server.stop()
        self.server = InfluxServer(self.server.folder, self.server.port, max_body=2000)
        job = self.job(series='', disk_path='')
        job.points = [f'big v={number}i {number}' for number in range(1, 501)]
        job.run()
        self.assertEqual(len(self.server.query('SELECT v FROM big')), 500)


# --- Jobs: torrents ------------------------------------------------------------------------------

class QueueTest(Folder):
    def queue(self, items, **settings):
        """Return a queue of an rTorrent with these items."""
        self.engine = Double({'d.priority': 2, **item} for item in items)
        return self.another(**settings)

    def another(self, **settings):
        return make_job(torque.QueueManager, self.engine, self.folder, **settings)

    def started(self, job):
        """Run a job, and return the numbers of the items that it started."""
        del self.engine.asked[:]
        job.run()
        return [int(call[1], 16) for call in self.engine.asked if call[0] == 'd.start']

    def test_settings_of_pyrocore(self):
        job = self.queue([{}], matcher='prio=2', sort='-size', max_downloading_traffic='2m')
        self.assertEqual((job.config.sort_fields, job.config.downloading_traffic_max), (
            [('size', True)], 2 << 20))
        self.assertEqual(self.started(job), [0])
        job = self.queue([{'d.is_active': 1}, {}, {'d.priority': 3}], downloading_max=1, startable=(
            'is_ignored=0 message=\n prio>0 [ prio>2 OR [ NOT [ traits=audio kind_25=jpg ] ] ]'),
            downloading='[ prio>1 [ down>3 OR started<2i ] ]')      # of pyrocore's manual
        self.assertEqual(self.started(job), [2])

    def test_everything_running_takes_a_place(self):
        for facts in ('is_active', 'is_open', 'hashing', 'state', 'state message',
                      'state ignore_commands'):
            item = {f'd.{fact}': 1 for fact in facts.split()}
            with self.subTest(facts):
                self.assertEqual(self.started(self.queue([item, {}], downloading_max=1)), [])
                self.assertEqual(self.started(self.another(downloading_max=2)), [1])
        item = {'d.complete': 1, 'd.state': 1, 'd.is_open': 1}
        self.assertEqual(self.started(self.queue([item, {}], downloading_max=1)), [1])

    def test_counts_are_kept(self):
        active = {'d.is_active': 1, 'd.is_open': 1, 'd.state': 1, 'd.down.rate': 5000}
        for settings, expected in sides('''
                >> 0: 1, 8: 1, 9: 0, 20: 0
                start_at_once=3 >> 0: 3, 8: 1
                start_at_once=0 >> 0: 1, 1: 0
                downloading_min=4 >> 0: 4, 2: 2, 4: 1
                downloading_min=4 downloading_max=2 >> 0: 2
                downloading_max=0 >> 0: 0
                downloading=down>1m downloading_max=1 >> 3: 1
                downloading_traffic_max=14k >> 3: 0
                downloading_traffic_max=15k >> 3: 1'''):
            settings = dict(word.split('=') for word in settings.split())
            for running, wanted in re.findall(r'(\d+): (\d+)', expected):
                with self.subTest(running=running, **settings):
                    job = self.queue([active] * int(running) + [{}] * 30, **settings)
                    self.assertEqual(len(self.started(job)), int(wanted))
        self.assertEqual(self.started(self.queue([{}], dry_run=True)), [])

    def test_order_and_conditions_choose(self):
        items = [{'d.priority': 1, 'd.load_date': NOW}, {'d.priority': 3, 'd.load_date': NOW + 9},
                 {'d.priority': 3, 'd.load_date': NOW + 7}, {'d.priority': 0}, {'d.message': 'x'},
                 {'d.ignore_commands': 1}, {'d.completed_bytes': 5, 'd.size_bytes': 9},
                 {'d.message': 'is a ghost'}]
        for settings, wanted in sides('''
                >> 2 1 7 0
                sort_fields= >> 0 1 2 7
                startable=prio<2 >> 0 3
                sort=-name >> 7 2 1 0
                startable=|queue_startable_base=|sort=name >> 0 1 2 3 4 5 6 7
                startable=files=*.mkv alias=t prio=1 OR is_ignored=yes >> 5 0
                startable=custom_x=1 >>'''):
            settings = dict(word.split('=', 1) for word in settings.split('|') if word)
            with self.subTest(**settings):
                job = self.queue(items, start_at_once=9, **settings)
                self.assertEqual(self.started(job), [*map(int, wanted.split())])

    def test_stale_view_cannot_hide_downloads(self):
        views = 'default', 'main'
        hidden = {'views': views, 'd.state': 1, 'd.is_open': 1}
        items = [hidden, {'views': (*views, 'pyrotorque')}, {'views': views}]
        for settings, wanted in (({'downloading_max': 1}, []), ({'start_at_once': 5}, [1]),
                                 ({'downloading_max': 1, 'viewname': 'pyrotorque'}, [])):
            job = self.queue(items, **settings)
            self.engine.views = ['pyrotorque']
            self.assertEqual((self.started(job), self.started(job)), (wanted, []))

    def test_started_meanwhile_is_counted(self):
        """By hand, while the queue makes its list, or by another queue of the same rTorrent."""
        job, listing = self.queue([{}] * 9, downloading_max=2, start_at_once=2), torque.in_order
        both = threading.Barrier(2)

        def by_hand(torrents, keys):
            self.engine.tell([('d.start', HASH(0)), ('d.start', HASH(1))])
            return listing(torrents, keys)

        def slow(torrents, keys):
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(.3)                           # neither has started anything yet
            return listing(torrents, keys)
        with mock.patch('torque.in_order', by_hand):
            self.assertEqual(self.started(job), [0, 1])
        jobs = [job, self.another(downloading_max=4, start_at_once=4)]
        job.config['downloading_max'] = 4
        with mock.patch('torque.in_order', slow):
            threads = [threading.Thread(target=job.run) for job in jobs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(len(self.logged('INFO t: starting')), 2)

    def test_item_that_fails_costs_its_turn(self):
        job = self.queue([{}] * 3, sort='name')
        self.engine.faults = {HASH(0): RpcError('bad state')}
        self.fails('1 torrent failed, | bad state', job.run)
        self.assertTrue(self.logged('WARNING', "'n0'", 'bad state'))
        self.assertEqual(self.started(job), [2])        # n1 was started instead; n0 waits
        self.engine.faults = {}
        self.assertEqual(self.started(job), [0])

    def test_places_taken_by_closed_items_are_told(self):
        job = self.queue([
            {'d.state': 1, 'd.message': 'File name too long'},
            {'d.state': 1, 'd.hashing': 1}, {'d.state': 1, 'd.is_open': 1}], downloading_max=3)
        self.assertEqual(self.started(job) + self.started(job), [])
        self.assertEqual(self.logged('WARNING'), self.logged(
            "'n0'", 'could not be opened', 'File name too long'))

    def test_intermission_survives_restart(self):
        with mock.patch('time.time', return_value=1000.0) as clock:
            job = self.queue([{}] * 9, intermission='1m', start_at_once=2)
            job.dry_run = True
            self.assertEqual(self.started(job), [])     # a dry run uses nothing up
            self.assertTrue(self.logged('dry run, not done: starting', 'n1'))
            job.dry_run = False
            # The clock is set back at 900.
            for now, count in ((1000, 2), (1059, 0), (1060, 2), (1061, 0), (900, 0), (959, 0),
                               (961, 2)):
                clock.return_value = now
                self.assertEqual(len(self.started(job)), count, now)
                self.assertEqual(self.started(self.another(intermission='1m')), [])
        self.write('t.last_start', 'junk')
        self.assertEqual(self.another().last_start, 0)

    def test_room_is_left(self):
        disks = {'/a': (1, 1000), '/b': (2, 10000), '/gone': (None, None)}
        places = '/a 300, /a 650, /a 400, /gone 1, /b 9000, /b 901, /a 201, /b 800'
        items = [{'d.base_path': path, 'd.left_bytes': int(left)}
                 for path, left in map(str.split, places.split(','))]
        items[0]['d.state'] = 1
        with mock.patch('torque.disk_of', disks.get):
            job = self.queue(items, room='100b', start_at_once=8, sort='name')
            self.assertEqual(self.started(job), [2, 4, 7])
            self.assertEqual(self.logged('no room'), [
                f"INFO t: no room for 'n1' {HASH(1)}, which needs 650 B: 1000 B are free at '/a'"])
            job = self.queue(items[3:4], room='100b')
            self.assertEqual(self.started(job) + self.started(job), [])
            self.engine.same_files = False
            self.assertEqual(self.started(self.another(room='100b')), [])
        self.assertEqual(len(self.logged('no room', "it is not known what is free at '/gone'")), 2)
        self.assertEqual(len(self.logged('no room')), 3)

    def test_room_of_a_missing_folder_is_not_known(self):
        items = [{'d.directory': '/no/folder'}, {'d.directory': self.folder},
                 {'d.directory': self.path('new'), 'd.is_multi_file': 1}]
        job = self.queue([{'d.left_bytes': 1, **item} for item in items], room='1b',
                         start_at_once=8, sort='name')
        self.assertEqual(self.started(job), [1, 2])
        self.assertTrue(self.logged('INFO', 'no room', "'n0'", 'not known', '/no/folder/n0'))

    def test_run_by_hand_says_why_nothing_starts(self):
        active = {'d.is_active': 1, 'd.is_open': 1, 'd.state': 1, 'd.down.rate': 5000}
        for why, items, settings in (
                ('nothing is startable', [active], {}),
                ('9 of at most 9 are downloading', [active] * 9 + [{}], {}),
                ('0 of at most 0 are downloading', [{}], {'downloading_max': 0}),
                ('5 KiB/s are downloaded', [active, {}], {'downloading_traffic_max': '4k'}),
                ('the intermission goes on for 9m 59s', [{}], {'intermission': '10m'})):
            job = self.queue(items, **settings)
            job.last_start = time.time() - 0.5
            for job.config.alone, level in (True, 'INFO'), (False, 'DEBUG'):
                del self.lines[:]
                with self.subTest(why, level=level):
                    self.assertEqual(self.started(job), [])
                    self.assertEqual(self.lines, [f'{level} t: no start: {why}'])

    def test_client_is_told(self):
        for settings, words in (({}, ["torque: started 'a\\\\nb'"]), ({'quiet': 'yes'}, []),
                                ({'log_to_client': 'no'}, [])):
            with self.subTest(**settings):
                self.started(self.queue([{'d.name': 'a\\nb'}], **settings))
                self.assertEqual([call[2] for call in self.engine.asked if call[0] == 'print'],
                                 words)

    def test_sort_fields_are_checked(self):
        self.assertEqual(torque.parse_sort(' -prio,loaded , -custom_1'),
                         [('prio', True), ('loaded', False), ('custom_1', True)])
        self.refused("did you mean 'loaded'", torque.parse_sort, '-loadde')

    def test_what_is_not_known_comes_last(self):
        for name, values, *wanted in (
                ('custom_a', (None, 5, 'x', 5, None), '13204', '21304'),
                ('custom_a', ('10', '9.5', '', 'x', '-1\n'), '41032', '30142'),
                ('d_x', ('10', 9, '', '10x'), '1032', '3012'),
                ('loaded', (0, NOW, None, NOW - 1), '3102', '1302'),
                ('ratio', (0, 2.5, 1), '021', '120')):
            rows = [{name: value, 'name': str(at)} for at, value in enumerate(values)]
            for back, order in enumerate(wanted):
                found = torque.in_order(rows, [(name, bool(back))])
                self.assertEqual(''.join([row['name'] for row in found]), order)
        rows = [{'seedtime': None, 'name': 'b'}, {'seedtime': None, 'name': 'a'},
                {'seedtime': 1, 'name': 'c'}]
        found = torque.in_order(rows, torque.parse_sort('-seedtime, name'))
        self.assertEqual([row['name'] for row in found], [*'cab'])


class LiveQueueTest(Folder):
    number, runs, most = 0, 200, 4

    def setUp(self):
        super().setUp()
        self.start_server()
        self.engine, self.names = self.server.engine, {}
        for at in range(self.runs // 2):
            content, item = metafile(f'q{at}', 20000)
            self.names[item] = f'q{at}'
            self.server.load(content, item, f'd.priority.set={at % 4}')
            if at % 5 == 0:                             # these are complete soon after their start
                put_data(self.folder + '/data', f'q{at}', 20000)

    def start_server(self):
        self.server = self.ended(RTorrent(self.folder, rtorrent_command(self.number)))

    def state(self):
        """Return the hashes that take a place, that are started, and that are hashed."""
        rows, = self.engine.ask([('d.multicall2', '', 'default', 'd.hash=', 'd.complete=',
                                  'd.state=', 'd.is_open=', 'd.is_active=', 'd.hashing=')])
        return ({row[0] for row in rows if not row[1] and any(row[2:])},
                {row[0] for row in rows if row[2]}, {row[0] for row in rows if row[5]})

    def disturb(self, chance):
        """Do to an item what happens to them; return what."""
        what, command, running = chance.choice((
            ('finish', 'check_hash', True), ('finish', 'check_hash', True),
            ('fail', 'check_hash', True), ('stop', 'stop', True), ('hand', 'start', False),
            ('erase', 'erase', False), ('open', 'open', False)))
        taken, _, hashing = self.state()
        # 0.9.8 hangs for good when an item is stopped that is being checked
        items = sorted(item for item in self.names.keys() - hashing if (item in taken) == running)
        if not items:
            return 'nothing'
        item = chance.choice(items)
        if what == 'finish':
            put_data(self.folder + '/data', self.names[item], 20000)
        elif running:
            with contextlib.suppress(FileNotFoundError):
                os.remove(f'{self.folder}/data/{self.names[item]}')
        elif what == 'erase':
            del self.names[item]
        self.engine.tell([(f'd.{command}', item)])
        return what

    def restart(self, number):
        """Restart rTorrent; meanwhile a run says that it is away."""
        self.server.stop(number)
        with self.assertRaises(Unreachable):
            self.job.run()
        self.start_server()
        wait_for(lambda: self.server.engine.open().view.size('', 'default') >= len(self.names))
        return 'restart'

    def test_never_more_than_allowed(self):
        chance, seen, started, full = random.Random(5), set(), 0, 0
        ends = {self.runs // 3: signal.SIGINT, self.runs // 2: signal.SIGKILL}
        for run in range(self.runs):
            if run % 20 == 0:                           # torque is restarted
                self.job = make_job(torque.QueueManager, self.engine, self.folder, quiet='yes',
                                    downloading_max=self.most, start_at_once=2, startable='prio>0')
            try:
                seen.add(self.restart(ends[run]) if run in ends else self.disturb(chance))
                before, were_started, hashing = self.state()
                del self.lines[:]
                self.job.run()
                count = len(self.logged('INFO t: starting'))
                after, are_started, _ = self.state()
                started, full = started + count, full + (len(before) >= self.most)
                self.assertLessEqual(count, 2)
                if count:
                    self.assertLessEqual(len(after), self.most)
                if not hashing:                             # else some finish or fail meanwhile
                    self.assertLessEqual(count, max(0, self.most - len(before)))
                    self.assertEqual(were_started - are_started, set())
            except Unreachable:                 # 0.16.17 was seen to die of a check
                with self.assertRaises(Unreachable):    # for good
                    self.state()
                self.restart(signal.SIGKILL)
        self.assertEqual(seen - {'nothing'}, {
            'finish', 'fail', 'hand', 'stop', 'erase', 'open', 'restart'})
        self.assertGreater(min(started, full), self.runs // 10)


class LiveQueueNewTest(LiveQueueTest):
    number, runs, most = 1, 60, 3


HOSTILE_FILES = (
    '"; touch pwned; "', '$(touch pwned)', ',d.erase=', 'new\nline', '{{name}}', "it's", 'q"x',
    '$execute.throw=touch,pwned', '`touch pwned`', '(execute.throw,touch,pwned)', '[x]', 'trail ',
    '\\";touch pwned', '{%if x%}', '-rf', 'd.erase=', 'emoji 😀 é', 'tab\t', 'a', 'x', '*', '~',
    ' lead', '.hidden', 'back\\slash', 'raw\udcff', '\x01ctl', '{x}', 'a, b;c', '$d.erase=', 'é',
    '?', '%41')


class WatchTest(Folder):
    def setUp(self):
        super().setUp()
        self.engine, self.root = Double(), self.path('w')
        self.engine.address = types.SimpleNamespace(where='', kind='', is_local=lambda: True)
        os.mkdir(self.root)
        self.enter(mock.patch.multiple(torque.TreeWatch, RETRY=.1, MOST=.3))

    def watch(self, alone=False, **settings):
        """Return a TreeWatch of the root."""
        job = make_job(torque.TreeWatch, self.engine, self.path('state'), alone=alone,
                       **{'path': self.root, **settings})
        self.addCleanup(job.cleanup)
        return job

    def look(self, job=None, **settings):
        """Have a TreeWatch look once, and return the commands that loaded something."""
        del self.engine.asked[:]
        (job or self.watch(alone=True, **settings)).run()
        return self.loads()

    def loads(self):
        return [call[0] for call in self.engine.asked if call[0].startswith('load.')]

    def drop(self, name, content=None, old=False):
        """Write a metafile in the root, and return its hash."""
        content, info_hash = (content, '') if content is not None else metafile(
            os.path.basename(name))
        path = self.write(os.path.join('w', name), content)
        if old:
            os.utime(path, (1e9, 1e9))
        return info_hash

    def wait_loaded(self, *hashes):
        wait_for(lambda: set(hashes) <= set(self.engine.items))

    def test_roots_that_come_and_go(self):
        os.rmdir(self.root)
        job, words = self.watch(), "w' is not there; it is watched when it comes"
        self.fails(words, self.look)                            # nobody goes on watching
        shown, = self.watch().check()
        self.assertIn(words, shown)
        job.run()                                               # this one does: it is no failure
        self.assertEqual(len(self.logged('WARNING', words)), 1)
        with mock.patch.object(self.engine, 'reach', side_effect=Unreachable('away')):
            job.run()
        for leave in (shutil.rmtree, lambda root: os.rename(root, root + '.old')):
            os.mkdir(self.root)
            self.wait_loaded(self.drop(f'{leave.__name__}.torrent'))
            wait_for(self.logged, 'INFO', 'all folders are watched again')
            self.wait_loaded(self.drop(f'{leave.__name__}-2.torrent'))
            del self.lines[:]
            leave(self.root)
            wait_for(self.logged, 'WARNING', words)
        self.assertEqual(len(self.logged('WARNING')), 1)

    def test_run_by_hand_says_that_nothing_is_new(self):
        job = self.watch(alone=True)
        job.run()
        self.assertEqual(self.lines, [f'INFO t: no new metafile below {self.root}'])
        self.drop('a.torrent')
        job.run()
        self.assertEqual(len(self.logged('INFO', 'no new')), 1)
        job.config.alone = job.config['inotify'] = False
        job.run()
        self.assertTrue(self.logged('DEBUG', 'no new metafile'))

    def test_passing_errors_are_tried_again(self):
        job, read, tries = self.watch(), torque.read_metafile, []
        info_hash = self.drop('a.torrent')
        errors = [OSError(24, 'Too many open files'), RpcError('garbage'), KeyError('x')]

        def read_metafile(path):
            tries.append(time.monotonic())
            if errors:
                raise errors[0]
            return read(path)
        with mock.patch('torque.read_metafile', read_metafile):
            job.run()
            # Pauses grow, up to MOST.
            wait_for(lambda: any(last - first > .25 for first, last in zip(tries, tries[1:])))
            for words in 'Too many open files', 'garbage', "'x'":
                wait_for(self.logged, 'WARNING', 'a.torrent', words)
                del errors[0]
            self.wait_loaded(info_hash)
        self.assertEqual([line.split()[0] for line in self.lines], ['WARNING'] * 3 + ['INFO'])

    def test_flags_decide(self):
        for settings, names in sides('''
                normal >> a.torrent i.TORRENT restart.torrent Start.Up.S01E01.torrent
                normal >> START/p.torrent
                start >> d.start start/e.torrent load/f.start g.start.load
                start load_mode=start >> a.torrent
                start started=yes >> b.TORRENT Load.Wedding.2018.torrent
                normal started=yes >> c.load i.queue
                prio >> h.queue queue/j.torrent
                prio queued=yes >> l.torrent
                normal >> k.start.queue
                >> New.Start m.torrent.part torrent n.txt'''):
            wanted = re.findall('^[a-z]+', settings)
            settings = dict(re.findall('(\\w+)=(\\w+)', settings))
            for name in names.split():
                with self.subTest(name, **settings):
                    self.drop(name)
                    self.look(**settings)
                    calls = [call for call in self.engine.asked if call[0].startswith('load.')]
                    found = [call[0][5:].replace('normal', 'prio') if 'd.priority.set=0' in call
                             else call[0][5:] for call in calls]
                    self.assertEqual(found, wanted)
                    os.remove(f'{self.root}/{name}')
                    self.engine.items.clear()

    def test_flags_above_the_root_do_not_count(self):
        for path, names, wanted in (
                ('start/w', 'a.torrent b/c.torrent', 'normal'), ('w/start', 'a.torrent', 'start'),
                ('queue/load/w', 'start/a.torrent', 'start')):
            for name in names.split():
                with self.subTest(path, name=name):
                    file = self.write(f'{path}/{name}', metafile('a')[0])
                    self.assertEqual(self.look(path=self.path(path)), [f'load.{wanted}'])
                    os.remove(file)
                    self.engine.items.clear()

    def test_template_names(self):
        self.engine.aliases = {'TR': ['http://127.0.0.1']}
        job = self.watch(alone=True, path=f'{self.folder}:{self.root}', **{
            'cmd.b': 'd.custom2.set={{relpath}}|{{rel_path}}',
            'cmd_a': '{% if "TV" in flags %}d.custom1.set={{tracker_alias}}{% endif %}',
            'cmd.c': 'print={{watch_path}},{{pathname}},{{label}},{{filetype}},{{traits.show}}'})
        content, tracker = metafile('Some.Show.S01E02.mkv')[0], 'd.custom1.set="TR"'
        for folder, relpath, more in (('TV/x', 'TV/x', [tracker]), ('start', '', []), ('', '', []),
                                      ('TV/start/x/queue/load', 'TV/x', [tracker]),
                                      ('start/load.x/queue', 'load.x', [])):
            with self.subTest(folder):
                path = os.path.join(self.root, folder, 'x.torrent')
                self.assertEqual(job.plan(path, parse_metafile(content))[1], [
                    f'd.custom2.set="{relpath}|{relpath or "."}"',
                    f'print="{self.root}","{path}","tv/mkv",".mkv","Some.Show"', *more])
        shown = job.explain(self.write('w/TV/x.torrent', content))
        self.assertEqual({line.split()[0] for line in shown[1:]}, {'command', *job.NAMES})
        outside = self.write('x.torrent', metafile('x')[0])
        self.assertIn('if it lay below', self.watch().explain(outside)[0])
        for name, words in (('file.torrent', 'No such file'), ('file.txt', 'ends in none of .to')):
            self.assertIn(words, job.explain(f'/no/{name}')[0])
        for key, text, words in (('cmd.x', '{{oh}}', 'there is no'), ('path', ' : ', 'not set')):
            self.refused(words, self.watch, **{key: text})

    def test_trees_filled_at_once(self):
        job = self.watch(trace_inotify='yes')
        job.run()
        hashes = [self.drop('plain.torrent'), self.drop('a/b/c/deep.torrent')]
        for number in range(30):
            hashes.append(self.drop(f'{number}/x/y/{number}.torrent'))
        for make, name in ((os.rename, 'moved'), (os.link, 'linked'), (os.symlink, 'symlinked')):
            content, info_hash = metafile(name)
            self.write(f'else/{name}/q/a.torrent', content)
            source = f'else/{name}' if make == os.rename else f'else/{name}/q/a.torrent'
            make(f'{self.folder}/{source}', f'{self.root}/{name}.torrent')
            hashes.append(info_hash)
        self.wait_loaded(*hashes)
        self.assertEqual((len(self.loads()), self.logged('WARNING')), (len(hashes), []))
        self.assertTrue(self.logged('inotify: something changed'))

    def test_folders_that_move(self):
        job = self.watch()
        os.makedirs(self.root + '/a/sub')
        job.run()
        os.rename(self.root + '/a', self.root + '/b')
        inside = self.drop('b/sub/inside.torrent')
        self.wait_loaded(inside)
        self.assertEqual(self.engine.items[inside]['d.tied_to_file'],
                         self.root + '/b/sub/inside.torrent')
        os.rename(self.root + '/b', self.folder + '/out')
        self.write('out/sub/outside.torrent', metafile('outside')[0])
        self.wait_loaded(self.drop('b/sub/again.torrent'))
        self.assertEqual(len(self.loads()), 2)
        os.rename(self.folder + '/out', self.root + '/b/back')
        self.wait_loaded(metafile('outside')[1])
        self.assertEqual(len(self.loads()), 3)

    def test_folders_not_looked_into(self):
        for name in ('System Volume Information', *'''.hidden @eaDir @eadir $RECYCLE.BIN
                $Recycle.Bin Recycled @sharebin @__thumb @SynoResource lost+found
                ok/.stversions'''.split()):
            self.drop(f'{name}/x.torrent')
        self.write('w/session/rtorrent.lock', '')               # of any rTorrent
        self.drop('session/y.torrent')
        wanted = {self.drop('ok/z.torrent'), self.drop('start/.real.torrent'),
                  metafile('far')[1]}
        self.write('else/far.torrent', metafile('far')[0])
        for target, link in (('start', 'also'), ('..', 'ok/up'), ('../else', 'linked')):
            os.symlink(target, f'{self.root}/{link}')
        self.look()
        self.assertEqual(set(self.engine.items), wanted)
        self.assertEqual({item['d.tied_to_file'] for item in self.engine.items.values()}, {
            f'{self.root}/{name}.torrent' for name in ('ok/z', 'start/.real', 'linked/far')})

    def test_disk_is_mounted_over_a_folder(self):
        job = self.watch()
        os.mkdir(self.root + '/sub')
        job.run()
        self.write('disk/x.torrent', metafile('x')[0])
        self.bind(self.folder + '/disk', self.root + '/sub')
        self.wait_loaded(metafile('x')[1], self.drop('sub/y.torrent'))

    def test_session_is_left_alone(self):
        """By identity: reached through a link, from a relative path, known only after a look."""
        content, info_hash = metafile('mine')
        session = os.path.dirname(self.write('w/rt/session/x.torrent', content))
        os.symlink(session, self.folder + '/link')
        self.engine.items[info_hash] = {'d.tied_to_file': ''}

        def tells_now():
            self.engine.session_path = session + '/'
        for path, folder, change in (
                (self.folder + '/link', '', {}), ('rt/session/', self.root, {}),
                ('', '', {'reach': tells_now})):
            with self.subTest(path), mock.patch.multiple(
                    self.engine, session_path=path, cwd=folder, **change):
                self.look(remove_already_added='yes')
                self.assertEqual(os.listdir(session), ['x.torrent'])
                self.fails('the session folder', self.look, path=session)
        self.assertEqual(self.logged('loaded'), [])
        self.engine.session_path = self.folder
        self.look(remove_already_added='yes')                   # x is no part of that session
        self.assertEqual(os.listdir(session), [])

    def test_erased_items_stay_away(self):
        """Files that are not tied to their item: loaded by content, or second copies."""
        file, away = f'{self.root}/d/[tracker].a.torrent', self.folder + '/a'
        self.engine.same_files = False

        def looks_while_away():
            os.rename(self.root + '/d', away)
            self.look()
            os.rename(away, self.root + '/d')
        self.drop('d/[tracker].a.torrent', metafile('a')[0])
        for change, wanted in ((lambda: None, ['load.raw']), (lambda: None, []),
                               (lambda: os.utime(file, (1e9, 1e9)), ['load.raw']),
                               (looks_while_away, ['load.raw'])):
            change()
            self.assertEqual(self.look(), wanted)
            self.engine.items.clear()
        self.assertTrue(self.logged('INFO', 'a.torrent', 'its item was erased'))
        with mock.patch('torque.disk_of', return_value=(1, 1)):
            looks_while_away()                                  # its disk is not mounted now
        os.rename(self.root, away)                              # not there is not gone
        with self.assertRaises(LoggableError):
            self.look()
        os.rename(away, self.root)
        self.assertEqual(self.look(), [])
        os.link(file, away)
        os.chmod(file, 0o640)
        os.rename(self.root + '/d', self.root + '/e')           # it is the same file
        os.rename(away, self.root + '/link.torrent')
        self.assertEqual(self.look(), [])
        other = self.drop('n.torrent')                          # after one that is loaded
        os.utime(self.root + '/link.torrent')
        self.engine.faults[other] = Unreachable('gone')
        self.fails('gone', self.look)
        self.engine.items.clear()
        self.engine.faults.clear()
        self.assertEqual(self.look(), ['load.normal'])          # of that alone
        self.engine.same_files = True
        info_hash = self.drop('*.torrent')
        self.look()                                             # tied wherever that can be
        self.assertEqual(self.engine.items[info_hash]['d.tied_to_file'], self.root + '/*.torrent')

    def test_erased_items_stay_away_from_files_that_stay(self):
        """Tied ones, too: rTorrent may not be able to delete the file."""
        item, file = self.drop('a.start'), self.root + '/a.start'
        for change, loads in (
                (lambda: None, ['load.start']), (lambda: None, []),
                (lambda: os.utime(file), ['load.start']),
                (lambda: shutil.copystat(self.root, file), ['load.start'])):
            change()
            self.assertEqual(self.look(), loads)
            self.assertEqual(self.look(), [])                   # it is there, and tied
            self.engine.items.pop(item, None)
        self.assertTrue(self.logged('INFO', 'a.start', 'touch it to have it loaded again'))

    def test_files_that_have_gone_are_forgotten(self):
        self.drop('a/x.torrent')
        kept = self.path('x')
        os.link(self.root + '/a/x.torrent', kept)
        job = self.watch(inotify='no', path=f'{self.root}:{self.folder}/missing')
        for _ in range(2):
            self.fails('missing', job.run)
            self.assertEqual(self.loads(), ['load.normal'])
            self.engine.items.clear()
            del self.engine.asked[:]
            os.remove(self.root + '/a/x.torrent')               # by rTorrent
            self.fails('missing', job.run)
            os.link(kept, self.root + '/a/x.torrent')

    def test_disks_that_number_their_files_anew(self):
        item, state = self.drop('x.torrent'), torque.file_state
        self.assertEqual(self.look(), ['load.normal'])
        del self.engine.items[item]
        with mock.patch('torque.file_state', lambda status: state(status)._replace(inode=1)):
            self.assertEqual(self.look(), [])

    def test_item_that_came_from_the_file(self):
        """By content, so that it is tied to nothing."""
        self.engine.same_files = False
        self.drop('[a].torrent')
        for _ in range(3):                                      # each is another start
            self.look(remove_already_added='yes')
        self.assertEqual((self.logged('loaded already'), os.listdir(self.root)),
                         ([], ['[a].torrent']))

    def test_rtorrent_is_not_lost_a_third_time(self):
        info_hash = self.drop('b.torrent')
        self.drop('a.torrent')
        away = Unreachable('the connection was closed without an answer')

        def dies():
            if 'a.torrent' in str(self.engine.asked[-1]):
                raise away
        job = self.watch(inotify='no')
        self.engine.faults = {'load.normal': dies}
        for _ in range(2):
            self.fails('', job.run, kind=Unreachable)
            with mock.patch.object(self.engine, 'reach', side_effect=away):
                self.fails('', job.run, kind=Unreachable)       # nothing was sent
        self.assertEqual(self.look(job), ['load.normal'])
        self.assertEqual(list(self.engine.items), [info_hash])
        self.assertTrue(self.logged('WARNING', 'a.torrent', 'went away twice when it was sent; '
                                                            'touch it to have it tried again'))
        self.assertEqual(self.look(job), [])
        self.engine.faults = {}
        os.utime(self.root + '/a.torrent')
        self.assertEqual(self.look(job), ['load.normal'])

    def test_time_is_noted(self):
        for command, noted in (('d.custom.set=x,y', True), ('d.custom.set=tm_loaded,5', False)):
            self.drop('a.torrent')
            with mock.patch('time.time', return_value=1e9 + .7):
                self.look(**{'cmd.x': command})
            loaded, = [call for call in self.engine.asked if call[0] == 'load.normal']
            self.assertEqual('d.custom.set=tm_loaded,1000000001' in loaded, noted)
            self.assertIn(command, loaded)
            self.engine.items.clear()

    def test_missing_commands_are_found(self):
        self.engine.methods = {'d.stop', 'd.custom.set', 'print'}
        self.engine.faults = {'method.get': RpcError('Key not found.')}
        job = self.watch(**{'cmd.a': 'd.stop= ; {{if relpath}}d.stopp={{else}}no.such=1{{endif}}',
                            'cmd.b': 'd.custom.set=a,{{relpath}}; print={{relpath}}'})
        self.assertEqual(job.check(), [
            "rTorrent has no command 'd.stopp'; did you mean 'd.stop'?",
            "rTorrent has no command 'no.such'"])
        self.engine.faults = {}                                 # they are private ones
        self.assertEqual(job.check(), [])

    def test_files_not_whole_wait(self):
        content, info_hash = metafile('slow', 99999)
        job = self.watch()
        with mock.patch.object(job, 'RETRY', 1000):             # only events, no time that passes
            job.run()
            with open(self.root + '/slow.torrent', 'wb') as stream:
                for part in (b'', content[:100], content[100:-1]):
                    stream.write(part)
                    stream.flush()
                    wait_for(lambda: self.root + '/slow.torrent' in job.handled)
                stream.write(content[-1:])
            self.wait_loaded(info_hash)
        self.drop('broken.torrent', content[:-1])               # this one stays so
        self.drop('other.torrent', b'<html>', old=True)
        wait_for(lambda: len(self.logged('WARNING', 'is not loaded: not bencoded')) == 2)
        job.run()
        self.assertEqual([len(self.logged('WARNING', name)) for name in ('slow', 'broken', 'oth')],
                         [0, 1, 1])
        self.drop('other.torrent', metafile('mended')[0])
        self.wait_loaded(metafile('mended')[1])

    def test_overflow_is_one_more_event(self):
        job = self.watch()
        job.run()
        with open('/proc/sys/fs/inotify/max_queued_events', encoding='ascii') as stream:
            most = int(stream.read())
        with job.lock:                                          # nobody reads the events
            for number in range(most + 10):
                self.drop('ab'[number % 2], b'')
            hashes = [self.drop(f'{number}/{number}.torrent') for number in range(20)]
        self.wait_loaded(*hashes, self.drop('7/8/later.torrent'))
        self.assertEqual(len(self.loads()), 21)

    def test_tenth_of_the_time_is_spent_looking(self):
        job = self.watch(alone=True)
        with mock.patch.object(job, 'scan', return_value={}), mock.patch(
                'time.monotonic', side_effect=[100, 102]), mock.patch.object(
                job.ended, 'wait', side_effect=[False, True]) as rest:
            job.watch(mock.Mock())
        self.assertEqual([call[0] for call in rest.call_args_list], [(0,), (18,)])

    def test_trouble_is_told(self):
        job, scandir = self.watch(), os.scandir
        hashes = [self.drop(f'{name}/{name}.torrent') for name in ('closed', 'full')]
        os.symlink('loop.torrent', self.root + '/loop.torrent')

        def scan(folder):
            if 'closed' in folder:
                raise PermissionError(13, 'Permission denied')
            return scandir(folder)
        full = OSError(28, 'No space')
        with mock.patch('os.scandir', scan), mock.patch('torque.Inotify.add', side_effect=full):
            job.run()
            shown, = self.logged('WARNING')
            for words in ("w' cannot be watched or read: too many inotify watches",
                          "closed' cannot be watched or read: Permission denied",
                          "loop.torrent' cannot be watched or read: Too many levels"):
                self.assertIn(words, shown)
            self.assertEqual(list(self.engine.items), hashes[1:])
        os.remove(self.root + '/loop.torrent')
        job.run()
        self.assertEqual(list(self.engine.items), hashes[::-1])
        job.cleanup()
        job, info_hash = self.watch(), self.drop('a.torrent')
        with mock.patch('torque.Inotify', side_effect=OSError(24, 'Too many open files')):
            self.fails('no inotify, |Too many open files', job.run)
        self.assertIn(info_hash, self.engine.items)
        job.run()
        self.wait_loaded(self.drop('b.torrent'))

    def test_what_is_no_file(self):
        os.mkfifo(self.root + '/pipe.torrent')
        os.utime(self.root + '/pipe.torrent', (1e9, 1e9))
        os.symlink('/no/file', self.root + '/dangling.torrent')
        job, good = self.watch(inotify='no'), self.drop('folder.torrent/good.torrent')
        for _ in range(2):
            job.run()
            self.assertEqual(len(job.handled), 2)
        self.assertEqual(list(self.engine.items), [good])
        self.assertEqual(len(self.logged('WARNING', 'pipe', 'no regular file')), 1)
        os.remove(self.root + '/pipe.torrent')                  # what is gone is forgotten
        shutil.rmtree(self.root + '/folder.torrent')
        job.run()
        self.assertEqual(job.handled, {})

    def test_threads_and_descriptors_end(self):
        def all_closed():
            links = []
            for name in os.listdir('/proc/self/fd'):
                with contextlib.suppress(OSError):
                    links.append(os.readlink(f'/proc/self/fd/{name}'))
            return not [link for link in links if 'inotify' in link or 'mountinfo' in link]
        job = self.watch()
        for number in range(3):                                 # a thread that dies is replaced
            job.run()
            self.wait_loaded(self.drop(f'{number}.torrent'))
            self.assertFalse(all_closed())
            with mock.patch.object(job, 'look_again', side_effect=SystemExit):
                if number == 2:
                    job.cleanup()
                self.drop('a.txt', b'')
                job.thread.join(20)
            wait_for(all_closed)

    def test_same_item_twice(self):
        def left_of(*names):
            for name in names:
                self.drop(name, content)
            self.look(remove_already_added='yes')
            return sorted(os.listdir(self.root))
        content, info_hash = metafile('same')
        real = 'a 😀\udcff.torrent'
        self.assertEqual(left_of(real, 'b.torrent'), [real])
        self.assertTrue(self.logged('b.torrent', "'same' is loaded already"))
        item = self.engine.items[info_hash]
        for seen in ('a ?????', 'a %F0%9F%98%80%FF', 'a 😀\ufffd'):     # as rTorrents tell it
            item['d.tied_to_file'] = f'{self.root}/{seen}.torrent'
            self.assertEqual(left_of(), [real])
        self.drop('c.torrent', content)
        os.symlink('c.torrent', self.root + '/link.torrent')
        other = item['d.tied_to_file'] = self.write('gone.torrent', content)
        self.look(remove_already_added='yes', dry_run=True)
        self.assertTrue(self.logged('dry run, not done: removing', 'c.torrent'))
        self.assertEqual(len(os.listdir(self.root)), 3)
        self.assertEqual(left_of(), ['link.torrent'])                   # only files are removed
        os.remove(other)
        self.assertEqual(left_of('d.torrent'), ['d.torrent', 'link.torrent'])   # the last one?
        os.link(self.root + '/d.torrent', other)
        self.assertEqual(left_of(), ['d.torrent', 'link.torrent'])      # it is the very same file
        os.remove(other)
        self.write('gone.torrent', content)
        read = torque.read_metafile

        def changes(path):
            meta = read(path)
            self.drop('d.torrent', b'new')
            return meta
        with mock.patch('torque.read_metafile', changes):
            self.assertEqual(left_of(), ['d.torrent', 'link.torrent'])

    def test_second_file_stays_where_the_first_is_in_doubt(self):
        info_hash, item = self.drop('a.torrent'), {}
        content = metafile('a.torrent')[0]
        self.engine.items[info_hash] = item
        self.write('else/b.torrent', content)
        for name in '?', 'x%20y':
            self.write(f'else/{name}.torrent', content)
        for cwd, tied, left in (
                ('', self.path('else/?.torrent'), 1), ('', self.path('else/x%20y.torrent'), 1),
                (self.root, 'a.torrent', 1), (self.folder, 'w/../w/./a.torrent', 1),
                (self.path('else'), 'a.torrent', 1), (self.path('else'), 'b.torrent', 0)):
            item['d.tied_to_file'], self.engine.cwd = tied, cwd
            with self.subTest(cwd, tied=tied):
                self.look(remove_already_added='yes')
                self.assertEqual(len(os.listdir(self.root)), left)

    def test_by_path_or_content(self):
        job = self.watch(alone=True)

        def methods(*names):
            for name in names:
                self.drop(name)
            return self.look(job)
        self.assertEqual(methods('*.torrent', 'a.torrent'), ['load.raw', 'load.normal'])
        with mock.patch.object(job, 'appears', lambda meta: meta.info_hash in self.engine.items):
            self.engine.takes = 'load.raw'                      # it may not read these files
            self.assertEqual(methods('b.torrent', 'c.torrent'), ['load.normal', 'load.raw'] * 2)
            self.engine.same_files = False
            self.assertEqual(methods('d.start', 'e.start'),
                             ['load.start', 'load.raw_start', 'load.raw_start'])
            with mock.patch.object(self.engine, 'tell', side_effect=Unreachable('')):
                self.drop('large.torrent', metafile(
                    'large', pieces=bytes(2000000), length=100000 << 14)[0])
                self.look(job)
            self.assertTrue(self.logged('large', '1.9 MiB are more than rTorrent takes'))
            self.engine.takes = 'nothing'
            self.drop('f.torrent', metafile('f')[0].replace(b'8:announce', b'8:somebody'))
            self.assertEqual(len(methods('e.torrent')), 2)
        self.assertEqual([line.partition('rTorrent ')[2] for line in self.logged('did not')], [
            'did not take it, and does not say why', 'did not take it, and does not say why; '
            'it has no tracker: is DHT off?'])
        shutil.rmtree(self.path('state'))
        self.engine = Double()                                  # on another host
        job = self.watch(alone=True)
        self.assertEqual(set(methods()), {'load.raw', 'load.raw_start'})

    def test_rtorrent_is_told(self):
        self.drop('a.torrent', metafile('emoji 😀\n$d.erase=')[0])
        for settings in ({'dry_run': True}, {'quiet': 'yes'}, {'print_to_client': 'no'}, {}):
            self.engine.items.clear()
            os.utime(self.root + '/a.torrent')
            self.look(**settings)
            told = [word for call in self.engine.asked for word in call if 'print=' in word]
            self.assertEqual(len(told), int(not settings))
        self.assertIn("print=\"torque: loaded 'emoji 😀\\\\n$d.erase=' from", told[0])
        self.assertTrue(self.logged('dry run, not done: loading'))

    def test_risks(self):
        job = self.watch(path=f'{self.root}:/no/folder')
        self.assertEqual(job.risks(), [])
        os.chmod(self.root, 0o777)
        self.assertEqual(job.risks(), [f'{self.root}, which is watched, can be written by every '
                                       'user'])


class LiveWatchTest(Folder):
    def setUp(self):
        super().setUp()
        self.root = self.path('w')
        os.mkdir(self.root)
        self.hashes = {}

    def start(self, command=None, rc=''):
        self.rtorrent = self.ended(RTorrent(self.folder, command, rc=rc))
        self.proxy = self.rtorrent.engine.open()
        return self

    def torque(self, ini=''):
        """Start torque with a TreeWatch."""
        self.ini = write_ini(self.folder, self.rtorrent.url, 'job.connstats.active = no\n'
                             'job.treewatch.active = yes\n'
                             f'job.treewatch.path = {self.root}\n{ini}')
        return self.ended(start_torque('-c', self.ini, '-v'))

    def drop(self, name, count=1, rename=True):
        """Write metafiles into the root, or rename them into it."""
        for number in range(count):
            content, info_hash = metafile(f'{os.path.basename(name)} {number}')
            self.hashes[info_hash] = path = f'{self.root}/{name}{number}.torrent'
            if rename:
                os.rename(self.write('new', content), path)
            else:
                self.write(os.path.relpath(path, self.folder), content)

    def wait_items(self, hashes):
        wait_for(lambda: set(self.proxy.download_list('')) >= set(hashes), seconds=60)

    def test_nothing_is_lost(self):
        self.start()
        self.drop('down', 20)
        program = self.torque()
        self.wait_items(self.hashes)
        self.drop('renamed', 500)
        self.drop('written', 500, rename=False)
        self.drop('a/b/c/deep', 20, rename=False)
        self.drop('pattern[1]*', 1)
        self.wait_items(self.hashes)
        loads = wait_for(lambda: len(program.seen('INFO', 'loaded')) >= len(self.hashes) and
                         [line.partition(' from ')[2] for line in program.seen('INFO', 'loaded')])
        self.assertEqual(sorted(loads), sorted(map(repr, self.hashes.values())))
        for turn in range(3):                                   # killed in the middle of a burst
            self.drop(f'burst{turn}-', 100)
            program.wait(f'burst{turn}-')
            self.assertEqual(program.stop(signal.SIGKILL), -signal.SIGKILL)
            self.drop(f'more{turn}-', 20)
            program = self.torque()
        self.wait_items(self.hashes)
        self.rtorrent.stop(signal.SIGKILL)
        self.drop('away', 100)
        program.wait('WARNING engine')
        self.start()
        self.wait_items(self.hashes)
        self.assertEqual(dict(zip(self.hashes, self.rtorrent.engine.ask([
            ('d.tied_to_file', info_hash) for info_hash in self.hashes]))), self.hashes)
        self.assertEqual(program.stop(), 0)
        self.assertEqual(program.seen('is loaded already'), [])
        self.assertTrue(all(map(os.path.exists, self.hashes.values())))

    def test_names_arrive_whole(self):
        names = {}
        for name in HOSTILE_FILES:
            content, info_hash = metafile(name)
            names[info_hash] = name
            self.write(f'w/_{name}/{name}.Torrent', content)
        self.write('w/zz/twice.torrent', content)
        for command in RTORRENTS:
            program = self.start(command).torque(
                'job.treewatch.cmd.a = d.custom1.set={{info_name}}\n'
                'job.treewatch.cmd.b = d.custom.set=target,/done/{{relpath}}/{{info_name}}\n'
                'job.treewatch.cmd_c = {% if info_name != "y" %}d.custom2.set="{{info_name}}"'
                '{% endif %} ; print={{info_name}},{{pathname}}\n')
            program.wait('twice.torrent', 'is loaded already')
            self.wait_items(names)
            for info_hash, name in names.items():
                if name.isascii() or self.rtorrent.engine.speaks_json and '\udcff' not in name:
                    with self.subTest(name):
                        self.assertEqual(
                            self.rtorrent.engine.ask([
                                ('d.custom1', info_hash), ('d.custom2', info_hash),
                                ('d.custom', info_hash, 'target')]),
                            [name, name, f'/done/_{name}/{name}'])
            self.assertEqual(program.seen('ERROR'), [])
            self.assertEqual((program.stop(), self.rtorrent.stop(signal.SIGKILL)), (0, -9))
            self.forget()
            self.assertEqual(len(tree(self.root)), len(names) + 1)
            self.assertFalse(os.path.exists(self.folder + '/pwned') or os.path.exists('pwned'))

    def forget(self):
        for folder in 'session', 'state':
            shutil.rmtree(self.path(folder))

    def test_erased_items_stay_away(self):
        """Those of a folder in which rTorrent can delete nothing, and of a magnet link."""
        content, info_hash = metafile('stays')
        self.write('disk/stays.start', content)
        self.write('disk/m.torrent', bencode({
            'magnet-uri': f'magnet:?xt=urn:btih:{HASH(9)}&tr=http%3A%2F%2F127.0.0.1%3A1%2Fa'}))
        self.bind(self.folder + '/disk', self.root)
        self.as_root('mount', '-o', 'remount,ro,bind', self.root)
        for command in RTORRENTS:
            began = int(time.time())
            program = self.start(command).torque()
            self.wait_items([info_hash, HASH(9)])
            self.assertEqual(self.proxy.d.tied_to_file(HASH(9)), self.root + '/m.torrent')
            for item in info_hash, HASH(9):
                self.assertGreaterEqual(int(self.proxy.d.custom(item, 'tm_loaded')), began)
                self.proxy.d.erase(item)
            program.wait('loaded', 'stays.start')
            self.assertEqual(program.stop(), 0)
            program = self.torque()
            for name in 'stays.start', 'm.torrent':
                program.wait(name, 'its item was erased')
            self.assertEqual((self.proxy.download_list(''), program.stop()), ([], 0))
            self.rtorrent.stop(signal.SIGKILL)
            self.forget()

    def test_ini_of_pyrocore(self):
        self.start()
        ini = '''\
            job.treewatch.handler       = pyrocore.torrent.watch:TreeWatch
            job.treewatch.schedule      = hour=*
            job.treewatch.dry_run       = False
            job.treewatch.quiet         = False
            job.treewatch.trace_inotify = False
            job.treewatch.log_level     = DEBUG
            job.treewatch.load_mode     = start
            job.treewatch.queued        = True
            job.treewatch.cmd.nfo       = f.multicall=*.nfo,f.priority.set=2
            job.treewatch.cmd.target    = {{# set target path
                }}d.custom.set=targetdir,/var/torrent/done/{{label}}/{{relpath}}
            job.treewatch.cmd.setdir    = {{# set download path
                }}{{if '/music/' in pathname}}{{# add metafile basename to path
                    }}d.directory_base.set="/srv/{{relpath}}/{{pathname|h.pathname}}"{{#
                }}{{elif traits.kind == 'tv'}}{{# store TV content into separate show folders
                    }}d.directory.set="/srv/{{relpath}}/{{traits.get('show', '_').replace('.',' ')\
.title()}}"{{#
                }}{{else}}{{# just use the relative metafile location
                    }}d.directory.set="/srv/{{relpath}}"{{#
                }}{{endif}}
            '''
        program = self.torque(textwrap.dedent(ini))
        for path, name, main, target, folder in (
                ('music/x/Album', 'Album', 'a', '/music/x', '/srv/music/x/Album'),
                ('new/a', 'pioneer.one.S01E06', 'b.mkv', 'tv/mkv/new',
                 '/srv/new/Pioneer One/pioneer.one.S01E06'),
                ('b', 'plain', 'c.iso', 'misc/iso/', '/srv/plain')):
            with self.subTest(path):
                content, info_hash = metafile(name, {main: 9, 'x.nfo': 1})
                path = self.write(f'w/{path}.torrent', content)
                self.wait_items([info_hash])
                self.assertEqual(
                    [self.proxy.d.custom(info_hash, 'targetdir'), self.proxy.d.directory(info_hash),
                     self.proxy.d.is_active(info_hash),
                     self.proxy.f.multicall(info_hash, '*.nfo', 'f.priority=')],
                    [f'/var/torrent/done/{target}', folder, 0, [[2]]])
        self.assertEqual((program.stop(), program.seen('ERROR')), (0, []))
        status, shown, _ = run_torque('-c', self.ini, '--explain', path)
        for words in (': queued; but it is loaded already', "info_name = 'plain'",
                      "relpath = ''", "flags = ['b', ",
                      'command d.directory.set="/srv/"', 'command f.multicall=*.nfo,f.prio'):
            self.assertIn(words, shown)
        self.assertEqual(status, 0)


INJECTIONS = ('"; touch pwned; "', '$(touch pwned)', ',d.erase=', 'a\nb', '{{name}}',
              '$d.erase=', '`touch pwned`', '%s \\', "it's; x")


def cross(path, new, link=os.link):
    """Stand for os.link between two disks; notes of removals are on one."""
    if 'removal.' in new:
        return link(path, new)
    raise OSError(18, 'cross-device')


class WithDouble(Folder):
    def setUp(self):
        super().setUp()
        self.reset()

    def reset(self):
        """Begin with an empty folder and an rTorrent without items."""
        shutil.rmtree(self.folder)
        os.mkdir(self.folder)
        self.engine = Double()

    def job(self, kind, **settings):
        return make_job(kind, self.engine, self.path('state'),
                        **{'matcher': '*', 'alone': True, **settings})

    def names(self):
        return [item['d.name'] for item in self.engine.items.values()]

    def refused_lines(self, kind, table):
        """Check mistakes of lines `words of the message | option=value | ...`."""
        for line in table.strip().splitlines():
            words, *settings = line.strip().split(' | ')
            settings = dict(setting.split('=', 1) for setting in settings)
            self.refused(words, self.job, kind, **settings)

    def holds(self, words, function, *params, **options):
        """Call; a doubt, which is no failure, is told once."""
        del self.lines[:]
        function(*params, **options)
        self.assertEqual(len(self.logged('INFO t: held back: ', words)), 1, self.lines)

    def killed(self, run, dies_at, linked=True):
        """Run something that is killed at a step: a request or one that changes the disk."""
        steps = iter(range(10000))

        def step():
            if next(steps) >= dies_at:
                raise Killed

        def stepped(name, change):
            def call(*args, **kwargs):
                if name == 'pwrite' and next(steps) >= dies_at:
                    change(args[0], args[1][:10], args[2])
                step()
                return change(*args, **kwargs)
            return call
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(self.engine, 'step', step))
            for name in 'link mkdir fsync rename remove unlink rmdir pwrite chown utime'.split():
                change = getattr(os, name)
                if name == 'link' and not linked:
                    change = cross
                stack.enter_context(mock.patch.object(os, name, stepped(name, change)))
            try:
                run()
                return False
            except Killed:
                return True


# action | args | what rTorrent is told, once
ACTIONS = '''
start | | d.start
stop | | d.stop
close | | d.stop; d.close
open | | d.open
ignore | | d.ignore_commands.set 1
heed | | d.ignore_commands.set 0
prio | 2 | d.priority.set 2; d.update_priorities
tag | X, best {{name}} | d.custom.set tags a=b best new x
tag | {% if name -%}x{%- endif %} |
tag | new |
untag | NEW nix | d.custom.set tags a=b best x
custom | note = {{name}} | d.custom.set note a=b
custom | 1= | d.custom1.set
log | {{name}} |
throttle | slow |
throttle | none | d.stop; d.throttle_name.set; d.start
exec | {{if ratio}}d.a=1{{endif}} |
exec | d.a=1;d.custom.set=x,{{name}} | branch d.hash= d.a=1; branch d.hash= d.custom.set="x","a=b"
hash_check | | d.check_hash'''
HALTS = ('stop', ''), ('close', ''), ('throttle', 'none'), ('delete', ''), ('cull', '')
ACTION_MISTAKES = '''
'purge' is not known; allowed are start | action=purge
is not set; for all | action=stop | matcher=
tag needs it | action=tag
'4' is no priority | action=prio | args=4
KEY=VALUE | action=custom | args=x
is for the action cull | action=delete | until_free=1g
allowed are keep delete | action=cull | shared=no
not a whole number | action=cull | limit=-1
'nam' is no field of a torrent; did you mean | action=tag | args={{nam}}
ignore takes none | action=ignore | args=0
have no sign | action=tag | args=+a -b
write 1=VALUE | action=custom | args=label=x'''


class ActionTest(WithDouble):
    def act(self, action, **settings):
        """Run an action; return what rTorrent was told."""
        self.engine.told = []
        self.job(Action, action=action, **settings).run()
        return '; '.join(self.engine.told)

    def test_each_action_has_commands(self):
        item = self.engine.items[self.engine.add(self.path('a=b'))]
        item.update({'d.custom=tags': 'New Best', 'd.throttle_name': 'slow'})
        for row in ACTIONS.strip().splitlines():
            with self.subTest(row):
                action, args, told = [part.strip() for part in row.split('|')]
                idle = action in ('start', 'open')
                item.update({'d.is_open': not idle, 'd.is_active': not idle, 'd.state': not idle,
                             'd.ignore_commands': action == 'heed'})
                self.assertEqual(self.act(action, args=args), told)
                if action not in ('custom', 'exec', 'hash_check'):
                    self.assertEqual(self.act(action, args=args), '')
        self.assertTrue(self.logged('INFO t: log', "'a=b'"))
        item.update({'d.is_active': 0, 'd.is_open': 0, 'd.state': 1})
        self.assertEqual(self.act('stop'), 'd.stop')    # it would start again with rTorrent

    def test_what_is_being_checked_is_left_alone(self):
        item = self.engine.items[self.engine.add(self.path('a'))]
        item.update({'d.hashing': 2, 'd.throttle_name': 'slow'})        # 0.9.8 would hang
        for action, args in HALTS:
            self.assertEqual(self.act(action, args=args), '')
            self.assertTrue(self.logged("held back: 'a'", 'it is being checked'))
            del self.lines[:]
        self.assertEqual(self.act('hash_check'), 'd.check_hash')
        item['d.hashing'] = 0
        self.engine.faults['branch'] = torque.BUSY        # it has begun since the list was made
        for action, args in HALTS:
            self.act(action, args=args)
            self.assertTrue(self.logged("held back: 'a'", 'it is being checked'))
            del self.lines[:]
        self.assertEqual((self.names(), len(tree(self.folder))), (['a'], 1))
        self.engine.faults.clear()
        item.update({'d.hashing': 1, 'd.hashing_failed': 1, 'd.is_active': 1})
        self.assertEqual(self.act('stop'), 'd.stop')    # rTorrent leaves it so for good
        self.act('cull')
        self.assertEqual(self.names(), [])

    def test_mistakes_are_refused(self):
        self.refused_lines(Action, ACTION_MISTAKES)

    def test_classes_of_characters_are_warned_of(self):
        condition = 'name=[TGx]* size>1 NOT name="a [b]"'
        for action in ('cull', 'delete'):
            risks = self.job(Action, action=action, matcher=condition).risks()
            self.assertEqual([risk.split(': ')[1] for risk in risks], ['name=[TGx]*', 'name=a [b]'])
        self.assertEqual(self.job(Action, action='stop', matcher=condition).risks(), [])

    def test_deleting_is_limited(self):
        for number in range(12):
            self.engine.add(self.path(f'{number:02}'))
        self.assertEqual(self.act('cull', limit='0'), '')
        self.assertTrue(self.logged('INFO t: held back', 'and 11 more: the limit is 0'))
        job = self.job(Action, action='cull', limit='0')
        for _ in range(2):                      # the page shows those of the last run
            job.run()
            self.assertEqual(job.outlook()[4:], ["'04': the limit is 0", 'and 7 more'])
        del self.lines[:]
        self.assertEqual(self.act('cull', dry_run=True, limit='2'), '')
        self.assertEqual([len(self.logged(words)) for words in ('not done: cull', 'INFO t: held')],
                         [2, 10])
        self.assertEqual(len(self.act('stop').split()), 12)
        self.act('delete', sort='-name')
        self.assertEqual((self.names(), len(tree(self.folder))), (['00', '01'], 12))
        self.assertTrue(self.logged('INFO', f"back: '01' {HASH(2)} and 1 more: the limit is 10"))

    def test_runs_that_do_nothing_say_so_by_hand(self):
        self.engine.add(self.path('a'))
        for why, kind, settings in (
                ('no torrent meets the condition', Action, {'action': 'stop', 'matcher': 'name=z'}),
                ('no torrent meets the condition', ItemCommand, {'args': 'x', 'matcher': 'name=z'}),
                ('nothing to do for 1 torrent', Action, {'action': 'start'}),
                ('nothing to do for 1 torrent', Move, {'target': '{{label}}'}),
                ("'true' has ended", Command, {'args': 'true'})):
            for dry_run in True, False:
                job = self.job(kind, dry_run=dry_run, **settings)
                for job.config.alone, level in (True, 'INFO'), (False, 'DEBUG'):
                    del self.lines[:]
                    job.run()
                    with self.subTest(why, kind=kind, dry_run=dry_run, level=level):
                        self.assertTrue(kind == Command and dry_run
                                        or self.logged(f'{level} t: {why}'), self.lines)

    def test_held_back_is_told_now_and_then(self):
        for name in 'abc':
            self.engine.add(self.path(name), base_path=self.path('none'))
        for kind in Action, Move:
            job = self.job(kind, action='cull', target=self.path('new'))
            del self.lines[:]
            for passed in 0, 30, 31:
                for error, (told, pause) in job.repeats.kinds.items():
                    job.repeats.kinds[error] = told - passed, pause
                job.run()
            said = self.logged('INFO')
            self.assertEqual(len(said), 2, said)
            self.assertIn(f"held back: 'a' {HASH(1)} and 2 more: there is no data at", said[0])
            del self.lines[:]
            self.job(kind, action='cull', target=self.path('new'), dry_run=True).run()
            self.assertEqual([line.split(':')[1] for line in self.lines], [' held back'] * 3)

    def test_cull_shows_what_is_lost(self):
        facts = {'size_bytes': 3000, 'ratio': 1530, 'complete': 1,
                 'timestamp.finished': int(time.time()) - 65 * 86400}
        self.engine.add(self.path('a'), {'x': b'1', 'sub/y': b'2'}, **facts)
        self.engine.add(self.path('b'), {'x': b'1'}, is_open=0, is_active=0, **facts)
        self.write('a/sub/extra.txt', '')
        self.act('cull', dry_run=True)
        first, second = self.logged('dry run, not done')
        self.assertIn(f"cull 'a' {HASH(1)} (3 KiB, ratio 1.53, seeded 9w 2d) with 2 files at "
                      f"'{self.path('a')}'", first)
        self.assertIn(f"'b' {HASH(2)} (3 KiB, ratio 1.53, seeded ?); it is closed: ", second)
        self.act('cull', matcher='name=a')
        self.act('cull', matcher='name=b')
        told, = self.logged('stays')
        self.assertRegex(told, f"INFO data: .*{self.folder}/a/sub' stays: .* are in it, such as "
                               "'extra.txt'")

    def test_erased_item_counts_whatever_its_data_does(self):
        for name in 'abc':
            self.engine.add(self.path(name))
        for error in (OSError(116, 'Stale file handle'), LoggableError('Stale file handle')):
            with mock.patch('torque.delete_data', side_effect=error):
                self.fails('1 torrent failed|Stale', self.act, 'cull', limit='1')
            self.assertEqual(len(self.logged('Stale', 'the next run tries again')), 1)
            self.assertEqual((self.names(), len(tree(self.folder))), ([*'bc'], 3))
            self.reset()
            for name in 'abc':
                self.engine.add(self.path(name))
            del self.lines[:]

    def test_condition_is_confirmed(self):
        item = self.engine.items[self.engine.add(self.path('a'))]
        job = self.job(Action, matcher='message=gone', action='cull', confirm='3')
        for step in ('', '', 'fine', '', '', 'failing', '', '', 'stuck', '', ''):
            item['d.message'] = step or 'gone'
            self.engine.faults = {}
            if step == 'failing':
                self.engine.faults = {('view.size', ''): 9}
            stuck = [LoggableError('an earlier removal')] * (step == 'stuck')
            with contextlib.suppress(LoggableError), mock.patch.object(
                    job, 'finish_removals', side_effect=stuck or None):
                job.run()
        self.assertEqual(self.names(), ['a'])
        job.run()
        self.assertEqual(self.names(), [])

    def test_failures_keep_data(self):
        data, second, no = {'m': b'm'}, HASH(2), RpcError('no')
        new = {'is_open': 0, 'base_path': '', 'timestamp.started': 0, 'completed_bytes': 0,
               'complete': 0, 'bitfield': ''}
        mine, other, linked = self.path('mine/m'), self.path('none'), self.path('linked')
        for words, left, faults, facts in (
                ('no', 'b', {('d.erase', second): no}, {}),
                ('gone', 'bc', {('d.erase', second): Unreachable('gone')}, {}),
                ('only 3 of the 9 items', 'abc', {'view.size': 9}, {}),
                ('no', 'abc', {'d.multicall2': no}, {}),
                ('there is no data', 'b', (), {'base_path': other}),
                ('may not be its own', 'b', (), {**new, 'files': [['m', 1, 0]]}),
                ('may not be its own', 'b', (), {'complete': 0, 'bitfield': '00', 'down.total': 0}),
                ('1 torrent failed', 'b', (), {'base_path': '/\ud800'}),
                ('open, and not', 'b', (), {'base_path': ''}),
                ('no data at', 'b', (), {'base_path': 'mine'}),
                ('no data at', 'b', (), {'base_path': './mine'}),
                ('leads out of it', 'b', (), {'files': [['../mine/m', 1, 1]]}),
                ('no data at', 'b', (), {'files': [[mine, 1, 1]]}),
                ('is a link', 'b', (), {'files': [['link/m', 1, 1]]}),
                ('is a link', 'b', (), {'base_path': linked})):
            with self.subTest(words, facts=facts):
                self.reset()
                for name in 'abc':
                    self.engine.add(self.path(name), data)
                put_data(self.folder, 'mine', data)
                os.symlink(self.path('mine'), self.path('b/link'))
                os.symlink(self.path('mine'), self.path('linked'))
                self.engine.faults = dict(faults)
                for name, value in facts.items():
                    self.engine.items[second]['d.' + name] = value
                check = self.holds
                if faults or 'failed' in words:
                    check = self.fails
                with mock.patch('os.getcwd', lambda: self.folder):
                    check(words, self.act, 'cull', limit='2')
                self.assertEqual(self.names(), [*left])
                self.assertEqual({path[0] for path in tree(self.folder)}, {*left, 'm'})

    def test_rows_do_not_grow_old(self):
        for action in ('delete', 'cull'):
            self.reset()
            for name in 'abcd':
                self.engine.add(self.path(name))
            self.engine.items[HASH(2)]['d.hashing'] = 3
            erase = self.engine.change

            def change(item, command, *params):
                self.engine.items[HASH(3)]['d.hashing'] = 1
                self.engine.items[HASH(4)]['d.message'] = 'stay'
                erase(item, command, *params)
            with mock.patch('torque.Choice.FRESH', -1), \
                    mock.patch.object(self.engine, 'change', change):
                self.act(action, matcher='message=')
            self.assertEqual(self.names(), ['b', 'c', 'd'])
            self.assertTrue(self.logged('INFO', 'held back', 'and 1 more: it is being checked'))
            self.assertTrue(self.logged("'d'", 'does not meet the condition any more'))

    def test_path_of_another_that_came_through_badly(self):
        kept = '????x', '???? y%F0', '%F0%9F%98%80x'
        for name in (*kept, '????', '?z', '?', 'b?'):
            with self.subTest(name):
                self.reset()
                self.engine.add(self.path('a'), {'x': b'1'})
                self.engine.add(self.path('b'), base_path=self.path(name, 'x'))
                for link in ('\U0001f600x', '\U0001f600 y\xf0'):
                    os.symlink(self.path('a'), self.path(link))
                with contextlib.suppress(LoggableError):
                    self.act('cull', matcher='name=a')
                self.assertEqual('a' in self.names(), name in kept)
                self.assertEqual(os.path.exists(self.path('a/x')), name in kept)

    def test_answers_of_wrong_types_are_one_error(self):
        self.engine.add(self.path('a'), {'x': b'1'})
        for method, wrong in (('d.directory', 7), ('d.is_open', '1'), ('d.hash', 7),
                              ('f.multicall', [['x']]), ('f.multicall', 5), ('system.cwd', 7),
                              ('f.multicall', [[1] * len(torque.ItemFile._fields)])):
            self.engine.faults = {method: wrong}
            with self.subTest(method, wrong=wrong):
                self.fails('is not understood', self.act, 'cull')
                self.assertEqual(tree(self.path('a')), {'x': b'1'})

    def test_killed_at_any_step(self):
        files = {f'sub/{name}': name.encode() for name in 'xyz'}
        for dies_at in range(1000):
            self.reset()
            for name in 'ab':
                self.engine.add(self.path(name), files)
            killed = self.killed(lambda: self.act('cull', matcher='name=a'), dies_at)
            with self.subTest(dies_at=dies_at):
                self.assertTrue(tree(self.path('a')) == files or self.names() == ['b'])
                self.act('cull', matcher='name=a')
                self.assertEqual((self.names(), tree(self.path('b'))), (['b'], files))
                self.assertEqual(os.listdir(self.path('state')), ['data.lock'])
                self.assertEqual(sorted(os.listdir(self.folder)), ['b', 'state'])
            if not killed:
                self.assertGreater(dies_at, 15)
                break


class CommandTest(WithDouble):
    def run_command(self, args, kind=None, **settings):
        self.job(kind or Command, args=args, **{'cwd': self.folder, **settings}).run()

    def test_args_are_a_list(self):
        self.run_command('printf "%s|" "a  b" $HOME \'*\' {{x}} ";"', env='')
        self.assertTrue(self.logged('INFO t: a  b|$HOME|*|{{x}}|;|'))
        self.run_command('pwd; echo "$A$B"', shell='yes', env='A=1 2, B=3')
        self.assertTrue(self.logged(f'INFO t: {self.folder}') and self.logged('INFO t: 1 23'))
        self.run_command('sh -c "seq 1 200000; echo \xe9 >&2"')
        self.assertEqual(len(self.logged('INFO t: 1999')), 99 - 1)
        self.refused_lines(Command, 'is not set\nNo closing quotation | args="')
        self.run_command('touch x', dry_run=True)
        self.assertTrue(self.logged('dry run, not done: running'))
        self.assertFalse(os.path.exists(self.path('x')))

    def test_what_only_a_shell_obeys(self):
        for line in '''
                |  a | b  a "b" |  | a
                ||  a || b
                &  a &
                &&  a && b
                ;  a ; b  a; b  a "b";  a "b~c"; d
                >  a > b  a >b  a >/dev/null 2>&1
                >>  a >> b  a >>b
                <  a < b
                <<  a << b
                2>  a 2>&1  a 2>/dev/null
                &>  a &>b'''.strip().splitlines():
            mark, *many = line.strip().split('  ')
            for args in many:
                for kind in Command, ItemCommand:
                    told = self.refused('is for a shell; write shell = yes', self.job, kind,
                                        args=args.replace('~', '\n'))
                    self.assertIn(f'{mark} is for', str(told))
        for args in r'''
                a "|" '&&' \; a\;
                a --x="b | c" "d;"
                a b|c x>3 me&you <me@x>
                sh -c 'a | b; c > d'
                a -> =>'''.strip().splitlines():
            with self.subTest(args=args):
                job = self.job(Command, args=args.strip())
                self.assertEqual((job.words, job.risks()), (shlex.split(args), []))
        self.job(Command, args='a | b; c', shell='yes')
        self.job(ItemCommand, args='a {{name | lower}} {{if size > 1}}b{{endif}}')

    def test_what_a_shell_would_read_is_warned_of(self):
        for args, marks in sides(r'''
                echo one # two >> #
                echo #x >> #
                echo $HOME >> $
                echo "a $HOME" >> $
                a `date` >> `
                a x=${Y}z >> $
                a $(date) `id` # b >> $`#
                echo "#" a#b '$A' \$A $ 5$ *.txt >>
                {{# x #}}{# y #}echo {{name}} >>'''):
            for kind in Command, ItemCommand:
                with self.subTest(args=args, kind=kind):
                    told = self.job(kind, args=args).risks()
                    self.assertEqual([line.partition(' is passed on')[0] for line in told],
                                     [f'job.t.args: {mark}' for mark in marks])
        self.assertEqual(self.job(Command, args='a $A # b', shell='yes').risks(), [])

    def test_home_is_found_and_programs_are_missed(self):
        script = self.write('bin/x.sh', '#!/bin/sh\necho "got $1"\n')
        self.engine.add(self.path('data'), name='~')
        self.enter(mock.patch.dict(os.environ, HOME=self.folder))
        for kind, args, word in (
                (Command, '~/bin/x.sh ~/y', f'got {self.folder}/y'),
                (ItemCommand, '~/bin/x.sh {{name}}', 'got ~'),
                (ItemCommand, '~/bin/x.sh ~/{{name}}', f'got {self.folder}/~')):
            job = self.job(kind, args=args)
            for mode, told in (0o600, [f'there is no program {script!r}']), (0o700, []):
                os.chmod(script, mode)
                self.assertEqual(job.check(), told)
            job.run()
            self.assertTrue(self.logged(f'INFO t: {word}'))
        for args, found in sides(f'''
                no-such-program x >> no
                /nowhere/x >> no
                A=1 sh >> no
                sh x >> yes
                a | b  shell=yes >> yes
                ./x.sh  cwd={self.folder}/bin >> yes
                ./x.sh >> no
                x.sh  env=PATH={self.folder}/bin >> yes'''):
            with self.subTest(args=args):
                args, *settings = args.split('  ')
                settings = dict(setting.split('=', 1) for setting in settings)
                told = self.job(Command, args=args, **settings).check()
                self.assertEqual(bool(told), found == 'no', told)

    def test_failures_are_told(self):
        for args, words in sides('''
                sh -c 'exit 3' >> ended with status 3
                sh -c 'kill -9 $$' >> status -9
                nosuchprogram x >> No such file
                echo a\0b >> null byte'''):
            self.fails(words, self.run_command, args)
        self.fails('/nonexistent', self.run_command, 'true', cwd='/nonexistent')

    def test_timeout_ends_all(self):
        script = ('(trap "touch ended; exit" TERM; sleep 300) & setsid sleep 5 & trap "" TERM; '
                  'echo said; sleep 300; sleep 300')
        self.fails('ended with force after 0.5 s', self.run_command,
                   script, shell='yes', timeout='0.5s')
        self.assertTrue(self.logged('said'))        # though one that is left holds the output open
        wait_for(os.path.exists, self.path('ended'))
        job = self.job(Command, args='sleep 300')
        with mock.patch('subprocess.Popen.wait', side_effect=KeyboardInterrupt), \
                self.assertRaises(KeyboardInterrupt):
            job.run()
        self.assertEqual(job.process.wait(20), -signal.SIGTERM)

    def test_output_is_bounded(self):
        kept, keep_end = [], torque.keep_end

        def keep(stream, end):
            kept.append(end)
            keep_end(stream, end)
        with mock.patch('torque.keep_end', keep):
            self.run_command('seq 1 3000000')
        self.assertEqual((len(kept[0]), len(self.logged('INFO t: '))), (50000, 101))
        self.assertTrue(self.logged('INFO t: 3000000'))
        self.run_command('(until test -e go; do sleep .01; done; echo late && touch alive) & '
                         'echo said', shell='yes')
        self.assertTrue(self.logged('said'))
        self.write('go', '')                        # what it left behind can still say something
        wait_for(os.path.exists, self.path('alive'))

    def test_templates_keep_out_of_shells(self):
        self.engine.add(self.path('data'), name='-rf', custom1='l\udcff\0')
        self.refused_lines(ItemCommand, '''
            args of a shell are no template | args=echo {{name}} | shell=yes
            would run | args=sh -c "echo {{name}}"
            is not set; for all | args=x | matcher=''')
        for words, args, message in (('would be an option', 'rm {{name}}', ''),
                                     ('surrogates', 'true', '\ud800')):
            self.engine.items[HASH(1)]['d.message'] = message
            self.fails(words, self.run_command, args, ItemCommand, matcher='*')
        self.engine.items[HASH(1)]['d.message'] = ''
        self.run_command('echo {{label}}', ItemCommand, matcher='*')
        self.assertTrue(self.logged('held back: ', 'a value holds a NUL'))
        self.run_command('env', ItemCommand, matcher='*')
        self.assertTrue(self.logged(f'TORRENT_HASH={HASH(1)}') and self.logged('TORRENT_LABEL=l'))

    def test_names_arrive_whole(self):
        for number, name in enumerate(INJECTIONS):
            self.engine.add(self.path(f'{number}'), name=name)
        self.run_command('printf "%s\\0" "$TORRENT_NAME" >> env', ItemCommand, shell='yes')
        self.run_command('sh -c \'printf "%s\\0" "$1" >> args\' sh {{name}}', ItemCommand)
        found = tree(self.folder)
        for name in ('env', 'args'):
            self.assertEqual({*found[name].decode().split('\0')}, {*INJECTIONS, ''})
        self.assertNotIn('pwned', found)

    def test_once_marks_what_worked(self):
        for name in ('a', 'b', 'c'):
            self.engine.add(self.path(name))
        args = 'echo $TORRENT_NAME >> ran; test $TORRENT_NAME != b'
        for ran in ('a b c', 'a b c b'):
            self.fails('1 torrent failed', self.run_command,
                       args, ItemCommand, shell='yes', matcher='*', once='yes')
            self.assertEqual(tree(self.folder)['ran'].decode().split(), ran.split())
        for name, ran in (('\xe9', 3), ('\xe8', 3), ('\xe9', 0), ('a_b', 3), ('a b', 3)):
            with self.subTest(name):
                del self.lines[:]
                self.run_command('echo did', ItemCommand, matcher='*', once='yes',
                                 job_name=name)
                self.assertEqual(len(self.logged('INFO', ': did')), ran)


class CullTest(WithDouble):
    def cull(self, **settings):
        self.job(Action, **{'action': 'cull', **settings}).run()

    def note(self, **steps):
        """Return a note of a cull of the first item that was cut short."""
        item = torque.ask_item(self.engine, HASH(1))
        removal = torque.Removal.begin(self.path('state'), item, torque.own_data(item),
                                       shared=False)
        removal.mark(**steps)
        return removal

    def test_promises_that_are_none(self):
        for text in ('[]', '"x"', '{', '{"1": 5}', '{"0": ["a", 1, 2]}', '{"0": [1, 2, Infinity]}'):
            self.reset()
            self.engine.add(self.path('a'))
            self.write('state/promised.json', text)
            with self.subTest(text), mock.patch('torque.disk_of', lambda path: (0, 5)):
                self.cull(until_free='900')
                self.assertEqual(self.names(), [])

    def test_doubts_are_named(self):
        def row(**values):
            facts = dict(zip(torque.ItemFile._fields, ['x', self.path('a/x'), 1, 1, 0, 1, 1, 1]))
            return {'f.multicall': [[*{**facts, **values}.values()]]}

        def replaced():
            os.rename(self.path('a/x'), self.path('was'))
            self.write('a/x', '1')
        for words, faults, change in (
                ('and torque does not', row(), lambda: os.remove(self.path('a/x'))),
                ('and rTorrent does not', row(is_created=0), None),
                ('has 2 bytes instead of the 1 ', row(), lambda: self.write('a/x', '12')),
                ('has 1 byte instead of the 2 ', row(size_bytes=2), None),
                ('open, and not what lies at', row(frozen_path='/else/x'), None),
                ('its metafile in the session folder does not tell', row(
                    path='?', frozen_path=self.path('a/?')), None),
                ('rTorrent cannot open it', {'d.is_open': 0}, None),
                ('was changed just now', {'d.close': replaced}, None),
                ('a removal was cut short', {}, lambda: self.write(
                    'state/removal.' + HASH(1), '')),
                ('nothing can be deleted in', {}, None)):
            self.reset()
            self.engine.add(self.path('a'), {'x': b'1'})
            self.engine.faults = faults
            if change:
                change()
            before = tree(self.path('a'))
            allowed = words != 'nothing can be deleted in'
            with self.subTest(words), mock.patch('os.access', return_value=allowed):
                check = self.holds
                if words in ('a removal was cut short', 'nothing can be deleted in'):
                    check = self.fails
                check(words, self.cull)
                self.assertEqual((self.names(), tree(self.path('a'))), (['a'], before))

    def test_metafile_that_says_two_names_is_no_proof(self):
        def names(**info):
            content = info_of(info)
            item = types.SimpleNamespace(hash=parse_metafile(content).info_hash,
                                         session=self.folder)
            self.write(f'{item.hash}.torrent', content)
            return torque.names_of_metafile(item)
        file = {'path': ['x'], 'length': 1}
        for info in ({'name.utf-8': 'b'}, {'name.x': 5}, {'name.x': ['a']},
                     {'files': [{**file, 'path.utf-8': ['y']}]},
                     {'files': [file, {**file, 'path': ['y'], 'path.x': 'y'}][1:]}):
            self.fails('does not tell the true one: it says another |.', names, **info,
                       kind=torque.HeldBack)
        self.assertEqual(names(**{'name.utf-8': 'a'}), ('a', ['a']))
        self.assertEqual(names(files=[{**file, 'path.utf-8': ['x']}]), ('a', ['x']))

    def test_notes_that_keep_data_say_why(self):
        for words, steps, change in (
                ('that was another rTorrent', {'asked': True},
                 lambda: setattr(self.engine, 'session_path', '/else/')),
                ('its item is there', {'asked': True}, lambda: None),
                ('it had not begun', {}, lambda: self.engine.items.pop(HASH(1))),
                ('rTorrent has no items at all', {'asked': True},
                 lambda: self.engine.items.clear()),
                ('another item uses', {'asked': True}, lambda: self.engine.items.pop(HASH(1)))):
            self.reset()
            for _ in range(2):
                self.engine.add(self.path('a'), {'x': b'1'})
            removal = self.note(**steps)
            change()
            with self.subTest(words):
                self.cull(matcher='name=none')
                self.assertEqual(len(self.logged('WARNING', 'is kept: its removal was', words)), 1)
                self.assertEqual(tree(self.path('a')), {'x': b'1'})
                self.assertFalse(os.path.exists(removal.path))

    def test_file_that_came_meanwhile_stays(self):
        self.engine.add(self.path('a'), {'x': b'1', 'y': b'2'})
        self.engine.add(self.path('b'))
        self.note(asked=True)
        del self.engine.items[HASH(1)]
        os.rename(self.path('a/x'), self.path('was'))
        self.write('a/x', '3')
        self.cull(matcher='name=none')
        self.assertEqual(tree(self.path('a')), {'x': b'3'})

    def test_item_is_as_it_was_when_it_was_not_erased(self):
        item = self.engine.items[self.engine.add(self.path('a'))]
        self.engine.add(self.path('b'))

        def away():
            self.engine.faults['d.open'] = Unreachable('away')
            return RpcError('no')
        self.engine.faults['d.erase'] = away
        with self.assertRaises(Unreachable):            # and so it is stopped
            self.cull(matcher='name=a')
        elsewhere = {'d.completed_bytes': 0, 'd.directory': '/', 'd.directory_base': '/'}
        item.update(elsewhere)                          # it has come back so
        self.engine.faults = {('branch', HASH(1)): torque.BUSY}
        self.cull(matcher='name=b')                     # one that is checked keeps no other
        self.assertTrue(self.logged('INFO t: held back', "'a'", 'it is being checked'))
        self.assertEqual(self.logged('WARNING t: the data'), [])    # told when it is done
        self.assertEqual((self.names(), item['d.state'], item['d.directory']), (['a'], 0, '/'))
        self.engine.faults.clear()
        self.cull(matcher='name=none')
        self.assertEqual((item['d.state'], item['d.directory']), (1, self.folder))
        self.assertNotIn('removal', str(os.listdir(self.path('state'))))

    def test_item_that_its_user_starts_meanwhile(self):
        item = self.engine.items[self.engine.add(self.path('a'), {'x': b'1'})]
        self.engine.add(self.path('b'), {'y': b'1'}, base_path=self.path('a'))
        for kind in Action, Move:
            item.update({'d.is_open': 0, 'd.is_active': 0, 'd.state': 0})

            def started():
                item.update({'d.is_open': 1, 'd.is_active': 1, 'd.state': 1})
            self.engine.faults['view.size_not_visible'] = started
            self.holds('use', self.job(kind, action='cull', matcher='name=a', shared='keep',
                                       target=self.path('new')).run)
            self.assertEqual(item['d.is_active'], 1)
        self.engine.faults.clear()
        item.update({'d.is_open': 0, 'd.is_active': 0})         # closed, and not stopped
        self.holds('use', self.job(Move, matcher='name=a', target=self.path('new')).run)
        self.assertEqual(item['d.is_open'], 0)

    def test_item_that_its_user_erases_meanwhile(self):
        self.engine.add(self.path('a'))
        self.engine.add(self.path('b'))

        def erased():
            self.engine.items.pop(HASH(1), None)
            return torque.HashNotFound('info-hash not found')
        self.engine.faults['d.erase'] = erased
        for matcher in 'name=a', 'name=none':
            with contextlib.suppress(LoggableError):
                self.cull(matcher=matcher)
            self.assertEqual((self.names(), sorted(tree(self.folder))), (['b'], ['a', 'b']))

    def test_answer_that_is_lost(self):
        self.engine.add(self.path('a'))
        self.engine.add(self.path('b'))

        def erased():
            del self.engine.items[HASH(1)]
            return Unreachable('lost')
        self.engine.faults['d.erase'] = erased
        self.cull(matcher='name=a')
        self.assertEqual((self.names(), [*tree(self.folder)]), (['b'], ['b']))

    def test_item_that_was_loaded_again_is_left_alone(self):
        for steps, active in (({'asked': True}, 1), ({'asked': True, 'erased': True}, 0)):
            self.reset()
            self.engine.add(self.path('a'), {'x': b'1'})
            self.note(**steps)
            again = self.engine.items[HASH(1)]
            again.update({'d.is_open': 0, 'd.is_active': 0, 'd.state': 0})
            self.cull(matcher='name=none')
            self.assertEqual((again['d.is_active'], again['d.state']), (active, active))
            self.assertEqual(tree(self.path('a')), {'x': b'1'})


class MoveTest(WithDouble):
    FILES = {'x': b'1' * 50000, 'sub/y': b'2' * 70000}

    def reset(self):
        super().reset()
        self.item = self.engine.items[self.engine.add(self.path('old/a'), self.FILES)]

    def move(self, **settings):
        self.job(Move, **{'target': self.path('new'), **settings}).run()

    def assert_at(self, place):
        """All is well with the item, in a folder."""
        self.assertEqual(tree(self.folder),
                         {f'{place}/a/{path}': content for path, content in self.FILES.items()})
        self.assertEqual([self.item['d.directory'], self.item['d.is_active'], self.item['d.state']],
                         [self.path(place, 'a'), 1, 1])

    def test_killed_at_any_step(self):
        for linked in (True, False):
            for dies_at in range(1000):
                self.reset()
                killed = self.killed(self.move, dies_at, linked)
                with self.subTest(linked=linked, dies_at=dies_at):
                    self.assertEqual(tree(self.item['d.directory']), self.FILES)
                    before = str(self.item)
                    self.move(matcher='hash=none', dry_run=True)
                    self.assertEqual(str(self.item), before)
                    self.move(matcher='hash=none')      # takes up what was begun
                    self.assert_at(os.path.relpath(self.item['d.directory'] + '/..', self.folder))
                    self.move()
                    self.assert_at('new')
                    self.assertEqual(os.listdir(self.path('state')), ['data.lock'])
                    self.assertEqual(os.listdir(self.path('new')), ['a'])
                if not killed:
                    self.assertGreater(dies_at, 30)
                    break

    def cut_short(self):
        """Kill a move of the item when its copy is whole."""
        self.engine.faults['d.directory.set'] = Killed()
        with self.assertRaises(Killed):
            self.move(matcher='name=a')
        self.engine.faults.clear()

    def test_move_that_cannot_be_finished_costs_its_item_only(self):
        other = self.engine.items[self.engine.add(self.path('old/b'))]
        self.cut_short()
        for place in ('old/a/x', 'new/a/x'):
            os.remove(self.path(place))
        job = self.job(Move, target=self.path('new'))
        self.fails('cannot be finished', job.run)
        self.assertEqual(len(self.logged('WARNING', "'a'", 'neither', 'has all of it')), 1)
        self.assertEqual(other['d.directory'], self.path('new'))
        job.run()                               # it is left alone for a while
        self.assertEqual([len(tree(self.path(place))) for place in ('old/a', 'new/a')], [1, 1])
        self.fails('1 torrent failed', self.job(Action, matcher='name=a', action='cull').run)

    def test_copy_that_only_seems_equal(self):
        """Size and time of a file tell nothing of what is in it."""
        with mock.patch('os.link', cross):
            self.cut_short()
        stat = os.stat(self.path('new/a/x'))
        self.write('new/a/x', b'3' * 50000)
        os.utime(self.path('new/a/x'), ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with contextlib.suppress(LoggableError):
            self.move()
        self.assertEqual(tree(self.item['d.directory']), self.FILES)

    def test_item_that_went_while_it_was_moved(self):
        for why, change in (
                ('that was another rTorrent', lambda: setattr(self.engine, 'session_path', '/x/')),
                ('rTorrent does not have it any more', lambda: self.engine.items.clear())):
            self.reset()
            self.cut_short()
            change()
            self.move(matcher='name=none')
            self.assertTrue(self.logged('WARNING', "stays at '%s' and '%s'" % (
                self.path('old/a'), self.path('new/a')), why))
            self.assertEqual(tree(self.path('old/a')), self.FILES)
            self.assertEqual(os.listdir(self.path('state')), ['data.lock'])

    def test_item_that_is_checked_meanwhile(self):
        self.engine.faults['branch'] = torque.BUSY
        self.holds('it is being checked', self.move)
        self.assert_at('old')
        self.assertEqual(os.listdir(self.path('state')), ['data.lock'])
        answers = iter([None, torque.BUSY, torque.BUSY])        # once its copy is whole
        self.engine.faults['branch'] = lambda: next(answers)
        self.holds('it is being checked', self.move)
        self.assertNotIn('d.directory', str(self.engine.told))      # it kills 0.9.8
        self.engine.faults['branch'] = torque.BUSY
        del self.lines[:]
        job = self.job(Move, target=self.path('new'), matcher='hash=none')
        for _ in range(3):
            job.run()
        self.assertEqual(len(self.logged('INFO t: held back', 'it is being checked')), 1)
        self.assertEqual(self.logged('WARNING'), [])
        self.engine.faults.clear()
        self.assertEqual([tree(self.path(place)) for place in ('old/a', 'new/a')],
                         [self.FILES, self.FILES])
        self.move(matcher='hash=none')
        self.assert_at('new')

    def test_item_that_was_paused(self):
        for tries, last, lines in (3, 'd.pause', 0), (1, 'd.start', 1):
            self.reset()
            self.item['d.is_active'] = 0
            answers = iter([None, None, None, torque.BUSY, None])   # it is checked at its start
            self.engine.faults['branch'] = lambda answers=answers: next(answers)
            with mock.patch('torque.PAUSE_TRIES', tries), mock.patch('time.sleep'):
                self.move()
            self.assertEqual(self.engine.told[-1], last)
            self.assertEqual(len(self.logged('WARNING', 'was paused, and is not any')), lines)

    def test_state_that_its_user_has_changed_meanwhile(self):
        for before, after in (1, 0), (0, 1):
            self.reset()
            self.item['d.state'] = self.item['d.is_active'] = before
            self.engine.faults['d.open'] = lambda: self.item.update({'d.state': after})
            self.move()
            self.assertEqual((self.item['d.directory'], self.item['d.state']),
                             (self.path('new/a'), after))

    def test_what_an_undone_move_has_made_goes(self):
        answers = iter([RpcError('no'), None, None])
        self.item['d.name'] = 'other'           # its folder is not named after it
        self.engine.faults['d.directory_base.set'] = lambda: next(answers)
        self.fails('1 torrent failed', self.move)
        self.assertEqual(os.listdir(self.path('new')), [])

    def test_copy_that_cannot_be_read(self):
        self.cut_short()
        self.engine.change(self.item, 'd.open')
        with mock.patch('torque.same_content', side_effect=OSError(5, 'Input/output error')):
            self.fails('cannot be finished|Input/output', self.move, matcher='hash=none')
        self.assertEqual((self.item['d.directory'], self.item['d.is_active']),
                         (self.path('old/a'), 1))

    def test_link_that_has_changed_is_the_same_file(self):
        self.cut_short()
        with open(self.path('old/a/x'), 'ab') as stream:
            stream.write(b'more')
        self.move(matcher='hash=none')
        self.assertEqual([*tree(self.folder)], ['new/a/x', 'new/a/sub/y'])

    def test_dry_run_leaves_notes_alone(self):
        new = self.write('state/removal.X.new', '')
        self.move(matcher='name=none', dry_run=True)
        self.assertTrue(os.path.exists(new))
        self.move(matcher='name=none')
        self.assertFalse(os.path.exists(new))

    def test_source_that_another_came_to_use_stays(self):
        def loaded():
            self.engine.faults.clear()
            self.engine.add(self.path('old/a'), self.FILES)
        self.engine.faults['d.open'] = loaded
        self.move(matcher='hash=' + HASH(1))
        self.assertTrue(self.logged('WARNING', 'stays, too: another item uses'))
        self.assertEqual([tree(self.path(place)) for place in ('old/a', 'new/a')],
                         [self.FILES, self.FILES])

    def test_one_run_at_a_time_deletes_or_moves(self):
        with torque.locked(self.path('state/data.lock'), 0), \
                mock.patch('torque.Choice.PATIENCE', 0.1):
            for kind in (Move, Action):
                job = self.job(kind, target=self.path('new'), action='cull')
                self.fails('another run deletes or moves', job.run)
            self.move(dry_run=True)
        self.assertEqual(self.engine.told, [])
        self.move()
        self.assert_at('new')

    def test_state_that_cannot_be_written_is_one_line(self):
        for kind in (Move, Action):
            job = make_job(kind, self.engine, '/dev/null/x', target=self.path('new'), action='cull',
                           matcher='*')
            self.fails('cannot be used: Not a directory', job.run)
        self.assert_at('old')

    def test_doubtful_moves_are_refused(self):
        self.refused_lines(Move, 'is not set | target=\n<-- here | target={{x')
        for words, target, facts, prepare in (
                ('exists: nothing is overwritten', 'new', {}, ('write', 'new/a', 'mine')),
                (HASH(1) + "' exists", 'new', {}, ('write', f'new/.torque-{HASH(1)}/x', 'mine')),
                ('File exists', 'file', {}, ('write', 'file', '')),
                ('lies in it', 'old/a/sub', {}, ()),
                ('is not there', 'new', {}, ('remove', 'old/a/x')),
                ('is a link', 'new', {}, ('link', 'old/a/x', '../../x')),
                ('exists', 'new', {}, ('link', 'new/a', '../old/a')),
                ("'../etc' would lead out", '{{label}}/x', {'d.custom1': '../etc'}, ()),
                ("'../etc' would lead out", '{{label}}', {'d.custom1': '..%2Fetc'}, ()),
                ('no data at', 'new', {'d.base_path': 'old/a'}, ())):
            with self.subTest(words, target=target):
                self.reset()
                self.item.update(facts)
                if prepare[:1] == ('write',):
                    self.write(*prepare[1:])
                elif prepare and prepare[1] == 'old/a/x':
                    os.rename(self.path('old/a/x'), self.path('x'))
                if prepare[:1] == ('link',):
                    os.makedirs(os.path.dirname(self.path(prepare[1])), exist_ok=True)
                    os.symlink(prepare[2], self.path(prepare[1]))
                before = tree(self.folder), str(self.item)
                check = self.holds
                if words == 'File exists':
                    check = self.fails
                check(words, self.move, target=f'{self.folder}/{target}')
                self.assertEqual((tree(self.folder), str(self.item)), before)
        for target in 'new ./new new/{{label}} $HOME/new /a/../b ../new {{label}}/../x'.split():
            self.refused('is no absolute path; allowed are /...', self.job, Move, target=target)
        self.holds("target 'x' is no absolute path", self.move, target='{{label}}x')

    def test_copy_is_like_the_original(self):
        """With holes, owner, mode and time."""
        old, owner = self.path('old/a/'), (os.getuid(), os.getgid())
        if os.getuid() == 0:
            owner = (1234, 1235)
        self.item['d.files'][0][1] = 16 << 20
        os.truncate(old + 'x', 0)
        os.truncate(old + 'x', 16 << 20)
        with open(old + 'x', 'r+b') as stream:
            stream.seek(8 << 20)
            stream.write(bytes(4096))
        modes = {'': 0o740, 'x': 0o741, 'sub': 0o742, 'sub/y': 0o743}
        for name, mode in modes.items():
            os.chown(old + name, *owner)
            os.chmod(old + name, mode)
        os.utime(old + 'x', (10 ** 9, 10 ** 9))
        with mock.patch('os.link', cross):
            self.move()
        for name, mode in modes.items():
            stat = os.stat(self.path('new/a', name))
            self.assertEqual((stat.st_uid, stat.st_gid, stat.st_mode & 0o777), (*owner, mode))
        stat = os.stat(self.path('new/a/x'))
        self.assertEqual((stat.st_mtime, stat.st_size), (10 ** 9, 16 << 20))
        self.assertLess(stat.st_blocks * 512, 1 << 20)

    def test_item_that_failed_is_left_alone_for_a_while(self):
        job = self.job(Move, target=self.path('new'))
        with mock.patch('os.link', cross), mock.patch('os.pwrite', side_effect=OSError(28, 'Full')):
            self.fails('Full', job.run)
            del self.engine.told[:]
            job.run()
        self.assertEqual(self.engine.told, [])

    def test_data_that_rtorrent_cannot_open_goes_back(self):
        file = self.engine.file

        def unopened(item, *row):
            facts = file(item, *row)
            if item['d.base_path'].startswith(self.path('new')):
                facts['f.is_created='] = 0
            return facts
        with mock.patch.object(self.engine, 'file', unopened):
            self.fails('rTorrent cannot open the data at', self.move)
        self.assert_at('old')

    def test_hard_link_needs_no_room(self):
        with mock.patch('torque.disk_of', return_value=(os.stat(self.folder).st_dev, 0)):
            self.move()
        self.assert_at('new')

    def test_failed_copy_leaves_nothing(self):
        info_hash = HASH(1)
        for words, name, faults in (
                ('No space left', 'os.pwrite', OSError(28, 'No space left')),
                ('Input/output error', 'os.lseek', OSError(5, 'Input/output error')),
                ('became shorter while it was copied', 'os.pread', b''),
                ('changed while it was copied', 'torque.OwnFile.is_same', False),
                ('cannot be given to the owner of', 'torque.give_owner', False),
                ('1 torrent failed', 'os.rename', OSError(1, 'no')),
                ('was opened while', '', {('d.is_open', info_hash): 1}),
                ('for something else', '', {('d.directory.set', info_hash): 0})):
            with self.subTest(words, name=name), mock.patch('os.link', cross), \
                    contextlib.ExitStack() as stack:
                if name:
                    stack.enter_context(mock.patch(name, side_effect=[faults] * 9))
                else:
                    self.engine.faults = faults
                self.fails(words, self.move)
                self.assert_at('old')
                self.assertEqual(os.listdir(self.path('new')), [])
        self.engine.faults = {}
        del self.engine.told[:]
        with mock.patch('torque.disk_of', return_value=(0, 99)):
            self.holds('no room: ', self.move)
        self.assertEqual(self.engine.told, [])          # nor is rTorrent bothered
        self.move()
        self.assert_at('new')


class LiveActionTest(Live):
    def test_missing_commands_are_found(self):
        engine = self.server.engine
        for kind in 'simple', 'simple|private':
            self.proxy.method.insert('', f'd.my_{len(kind)}', kind, 'd.hash=')
        engine.reach()
        engine.look()
        job = make_job(Action, engine, self.path('state'), matcher='d_nosuch=1 d_my_14=x *',
                       action='exec', args='d.stopp= ; d.stop= ; d.my_6=;d.my_14=')
        self.assertEqual([line.partition(';')[0] for line in job.check()], [
            f"rTorrent has no command '{name}'" for name in ('d.nosuch', 'd.stopp')])

    def test_hostile_names_arrive_whole(self):
        hashes = {name: self.server.load(*metafile(name)) for name in INJECTIONS}
        for action, args in (('exec', 'd.custom.set=one,{{name}};d.custom2.set={{name}};'
                              'execute.throw=touch,"{{path}}.t"'), ('tag', '{{name}}'),
                             ('log', '{{name}}'), ('custom', 'two={{name}}'), ('prio', '3'),
                             ('ignore', ''), ('throttle', 'slow'), ('start', ''), ('close', '')):
            status, log = self.once('Action', matcher='*', action=action, args=args)
            self.assertEqual(status, 0, log)
        files = {*tree(self.folder)}
        for name, item in hashes.items():
            with self.subTest(name):
                words = ' '.join(sorted({*name.lower().replace(',', ' ').split()}))
                self.assertEqual(self.server.engine.ask([
                    ('d.custom', item, 'one'), ('d.custom2', item), ('d.custom', item, 'two'),
                    ('d.custom', item, 'tags'), ('d.priority', item), ('d.throttle_name', item),
                    ('d.ignore_commands', item)]), [name, name, name, words, 3, 'slow', 1])
                self.assertIn(f'rt/data/{name}.t', files)
        self.assertFalse({path for path in files if path.endswith('pwned')})
        status, log = self.once('Action', matcher='*', action='exec', args='d.nosuch=')
        self.assertRegex(log, f'{len(hashes)} torrents failed.*d.nosuch')

    def test_marks_survive_a_restart(self):
        number = signal.SIGKILL
        if self.number:                 # 0.16 saves its session only later
            number = signal.SIGTERM
        items = [self.server.load(*metafile(name)) for name in INJECTIONS]
        for ran in len(items), 0:
            status, log = self.once('ItemCommand', matcher='*', once='yes', args='echo did')
            self.assertEqual((status, log.count(': did')), (0, ran), log)
            self.restart(number)

    def test_items_are_culled(self):
        """With their data, but without what else lies there and without folders of others."""
        self.write('rt/data/a/sub/mine', 'm')
        items = [self.item(name) for name in ('a', 'b', 'flat')]
        single, nothing = self.item('single', 9000), self.item('nothing')
        os.link(self.data + '/b/x', self.path('kept'))
        shutil.rmtree(self.data + '/nothing')
        self.assert_culled(items[0], 'rt/data/a/x', 'rt/data/a/sub/y')
        self.assert_culled(items[1], 'rt/data/b')
        self.assert_culled(single, 'rt/data/single')
        self.assert_held(nothing, 'there is no data')
        self.close(items[2])            # its files lie in a folder that is not named after it
        os.rename(self.data + '/flat', self.path('downloads'))
        self.proxy.d.directory_base.set(items[2], self.path('downloads'))
        self.assert_culled(items[2], 'downloads/x', 'downloads/sub')
        self.assertEqual(os.listdir(self.path('downloads')), [])
        shutil.rmtree(self.data + '/a')
        self.assert_culled(self.item('a'), 'rt/data/a')
        self.assertEqual(os.listdir(self.data), [])

    def test_items_are_moved(self):
        files = {'x': os.urandom(50000), 'sub/y': os.urandom(50000), 'none': b''}
        items = {name: self.item(name, files) for name in ('a b', 'linked')}
        items['single'] = self.item('single', 20000)
        shutil.rmtree(self.data + '/linked')
        shutil.copytree(self.data + '/a b', self.data + '/linked', copy_function=os.link)
        self.item('hard', 20000, self.path('elsewhere'))
        os.remove(self.path('elsewhere/hard'))
        os.link(self.data + '/single', self.path('elsewhere/hard'))
        self.write('rt/data/a b/mine', 'm')
        new = 'new, "place"/$d.name=/'
        for name, item in items.items():
            self.assert_moved(item, f'rt/data/{name}', new + name.upper())
            state = self.state(item)
            for target in (self.path(new + '{{name|upper}}'), '{{if is_ghost}}/nowhere{{endif}}'):
                self.assertEqual(self.move(item, target=target)[0], 0)
                self.assertEqual(self.state(item), state)
        if not self.number:             # 0.16 saves its session only later
            self.restart(signal.SIGKILL)
        for name, item in items.items():
            self.assertEqual(self.proxy.d.base_path(item), self.path(new + name.upper(), name))
            self.proxy.d.check_hash(item)
            self.wait_complete(item)

    # Names that do not come through as they are

    def test_names_that_rtorrent_changes(self):
        """Or that only seem so; each as a file and as a folder, which go with their data only."""
        names = {'a \udce9': 'a ?', 'b \udce9': 'b \ufffd', 'c \udce9': 'c %E9', 'what?': '',
                 '50%20off': '', '100%': '', 'odd \ufffd': ''}
        files = {'x': 9000, 'sub?/y%41': 5}
        for literal in filter(None, names.values()):    # what somebody else's data may be called
            put_data(self.data, literal, files)
            put_data(self.data, literal + '.bin', 9000)
        before = tree(self.folder)
        items = {self.item(name, files) for name in names}
        items |= {self.item(name + '.bin', 9000) for name in names}
        loaded = tree(self.folder)
        for words, left in (['-n'], (items, loaded)), ([], (set(), before)):
            log = self.cull('*', *words, limit=99)[1]
            self.assertEqual((self.known(*items), tree(self.folder)), left, log)

    def test_names_within_an_item(self):
        for name, odd, literal in (
                ('latin', 'caf\udce9', 'caf?'), ('folder', 'caf\udce9/y', 'caf?/y'),
                ('return', 'a\rb', 'a\nb'), ('control', 'a\x01b', 'a?b'),
                ('caf\udce9', 'caf\udce9', 'caf?')):
            with self.subTest(name):
                files, mine = {odd: bytes(9000), 'x': b'x'}, {literal: b'm'}
                item = self.item(name, files)
                put_data(self.data, name, mine)
                found = [{**files, **mine}, {}]
                for run, then in ((self.move, [mine, files]), (self.cull, [mine, {}])):
                    status, log = run(item)
                    if status == 0:     # else all is as it was
                        found = then
                    folders = self.path('rt/data', name), self.path('target', name)
                    self.assertEqual([*map(tree, folders)], found, log)
                self.assertEqual(self.known(item), {item} - {item if status == 0 else ''})


class LiveActionNewTest(LiveActionTest):
    number = 1


# --- Config --------------------------------------------------------------------------------------

HEAD = '[TORQUE]\nscgi_url = /nowhere\njob.connstats.active = no\n'          # lines 1 to 3
GOOD_INI = HEAD + 'job.a.handler = good:Plain\njob.a.schedule = 1h\n'       # and 4 to 5
DOES = GOOD_INI.replace('Plain', 'Does') + 'job.a.code = '                   # and 6
RUN = ('-c', 't.ini', '--run-once', 'a')
TIME = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d'
GOOD_PY = '''\
    import __main__, functools, sys, torque
    from torque import config_ini
    value = 1
    class Plain:
        def __init__(self, config=None):
            self.config = config
            self.LOG = torque.get_class_logger(self)
            if config.path == '':
                raise torque.UserError('job.%s.path is not set' % config.job_name)
        def run(self):
            self.LOG.debug('fine')
            self.LOG.info('ran %s', self.config)
            self.LOG.warning('careful')
        def cleanup(self):
            self.LOG.info('cleaned')
    class Does(torque.Job):
        cleanup = Plain.cleanup
        def run(self):
            exec(self.config.code)
    class Starts(Plain):
        def __init__(self, config):
            exec(config.code)
    class Inherits(torque.Job): pass
    class NoRun:
        def __init__(self, config): pass
    class Async(NoRun):
        async def run(self): pass
    class AsyncYields(NoRun):
        async def run(self): yield
    class Yields(NoRun):
        def run(self): yield
    class Asks(NoRun):
        def run(self, x): pass
    class AsksNamed(NoRun):
        def run(self, *, x): pass
    class NoSelf(NoRun):
        def run(): pass
    class InitAsks(torque.Job):
        def __init__(self, config): self.engine.open()
        run = print
    class Unusual(NoRun):
        @functools.wraps(Asks.run)
        def run(self, *args, x=1): pass
    class NoSuper(torque.Job):
        def __init__(self, config): self.code = config.code
        def run(self): exec(self.code)
    '''


def lines_of(text):
    """Return text of a table with a line's end for each bar, and \\x1b as one character."""
    return ast.literal_eval(f'''"""{text}\\n"""'''.replace('|', '\\n'))


class ConfigCase(Folder):
    """A test with a module of jobs beside t.ini, and a home of its own."""

    def setUp(self):
        super().setUp()
        for patch in (mock.patch.dict(os.environ, HOME=self.folder), mock.patch.dict(sys.modules),
                      mock.patch.object(sys, 'path', sys.path[:]),
                      mock.patch.object(logging, 'raiseExceptions', True)):
            self.enter(patch)
        for name in ('JOURNAL_STREAM', 'XDG_CONFIG_HOME', 'XDG_STATE_HOME'):
            os.environ.pop(name, None)
        self.addCleanup(config_ini.clear)
        self.write('good.py', GOOD_PY)

    def ini(self, content):
        """Write t.ini as it is given, and return its path."""
        return self.write('t.ini', content if isinstance(content, bytes) else content.encode())

    def load(self, content, *overrides, **kwargs):
        """Load t.ini and return its job objects by name."""
        config_ini.load(self.ini(content), overrides, **kwargs)
        return torque.make_jobs(config_ini.jobs)

    def check(self, content):
        """Return exit status and output of --check, and what it warns of in t.ini."""
        path, out, err = self.ini(content), io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = torque.main(['-c', path, '--check'])
        err = err.getvalue().replace(self.folder + os.sep, '')
        return status, out.getvalue(), err, re.findall('WARNING config: (.*)', err)

    def assert_refused(self, content, line, words, override=()):
        """That line (a regex) has the only mistake, told in one line that holds the words."""
        where = rf'^t\.ini:{line}: '
        if override:
            where = '^-D: '
        elif line == '-':
            where = r'^t\.ini: '
        error = self.fails('', self.load, content, *override, kind=Mistakes)
        told = str(error).replace(self.folder + os.sep, '')
        with self.subTest(content=content[-99:], override=override):
            self.assertRegex(told, where)
            for word in words.split('|'):
                self.assertIn(word, told)
            self.assertNotRegex(told, r"\n|\x1b|hunter2|('\w+').*; did you mean \1")

    def command(self, *words):
        """Run torque.py as a user does: no mistake of his ends in a traceback."""
        status, out, err = run_torque(*words, cwd=self.folder)
        self.assertNotIn('Traceback', out + err)
        return status, out, err


# Lines of an ini from 5 on, with | for the end of a line >> the line and words of a warning, if any
SHORTS = {
    'UNPACK ': '[TORQUE]|job.unpack.active = no|job.unpack.handler = torque:ItemCommand|',
    'OF_TWO ': '[TORQUE]|downloading_max = 3|job.mine.downloading_max = 4|',
    'UNUSED ': '[INFLUXDB]|pasword = x|[TORQUE]|'}
SURPRISES = '''
a = 1 ; b = 2 >> 5|a: what follows ` ;` is a comment
a = x=1 ; y=2|  z >> 5|a: what follows
a = 1|  job.b.c = 2 >> 5|a: job.b.c below is indented|belongs to this value
a = 1||# c|	grace=5 >> 5|a: grace below
a = 1|  job.my-job.c = 2 >> 5|below
a = 1|  jobs.b.c = 2 >> 5|below
a = 1|  job.b.c: 2 >> 5|below
a = 1|b = 2|a = 3 >> 7|a: stands here again|not line 5
UNPACK job.unpack.args = a ; b >> 8|cut off|without a blank
[TORQUE]|job.treewatch.cmd.x = d.a= ; d.b= >> 6|cut off
[TORQUE]|scgi_ulr = x >> 6|did you mean 'scgi_url'
[TORQUE]|httpd.activ = yes >> 6|did you mean 'httpd.active'
[TORQUE]|jobs.b.active = no >> 6|did you mean 'job.b.active'
[TORQUE]|Job.b.active = no >> 6|did you mean 'job.b.active'
[TORQUE]|queue.active = no >> 6|did you mean 'job.queue.active'
[TORQUE]|downloading_max = 3 >> 6|did you mean 'job.queue.downloading_max'
[TORQUE]|queue.room = 1g >> 6|did you mean 'job.queue.room'
OF_TWO job.mine.active = no >> 6|did you mean 'job.queue.downloading_max'
[TORQUE]|url = http://x >> 6|did you mean 'job.fluxstats.url'
[TORQUE]|Qq = x >> 6|Qq: this means nothing|job.NAME.Qq
[INFLUXDB]|job.b.c = 1|[TORQUE]|job.fluxstats.scgi_url = /x >> 6|job.b.c
UNUSED job.b.handler = torque:InfluxDB|job.b.active = no >> 6|mean 'password'
[ANNOUNCE]|job.b.c = 1 >> 6|ANNOUNCE|belongs under [TORQUE]
[GLOBAL]|sort_fields = name|scgi_url = /x >> 7|belongs under [TORQUE]
[XMLRPC_0_8_7]|job.queue.active = yes >> 6|belongs under [TORQUE]
[TORQ]|job.b.active = no >> 6|TORQ|did you mean|TORQUE
[Mine]|a = 1 >> 6|[MINE] means nothing
[TORQUE]|job.queue.actve = yes >> 6|no such option|did you mean 'active'
UNPACK job.unpack.args = a|job.mine.active = no|job.mine.action = b >>
a = 1 ; note >>
;a = 1 ; b = 2 >>
a = 1;b=2 >>
a = x=1|   [ y=2 OR [ NOT z=3 ] ] ; w=4 >>
a = {{# x|  }}d.custom.set=dir,/srv/{{label}} >>
'''


class IniTest(ConfigCase):
    def test_rules_hold(self):
        plain = f'{HEAD}[S]\na = 1\n  ü\nb = 2\n'.encode()
        for text, expected in sides(r'''
                Key = 1|kEY = 2 >> {'Key': '1', 'kEY': '2'}
                b c.d-e=ü >> {'b c.d-e': 'ü'}
                a: 1|b : x=y|c = x:y|d=1=2 >> {'a': '1', 'b': 'x=y', 'c': 'x:y', 'd': '1=2'}
                a = 100%% % %(x >> {'a': '100% % %(x'}
                a = %%(x)s >> {'a': '%(x)s'}
                a = 1 ; note >> {'a': '1'}
                a = 1\t;note >> {'a': '1'}
                a = ; note >> {'a': ''}
                a =;x >> {'a': ';x'}
                a = 1;2 # 3 >> {'a': '1;2 # 3'}
                a = x ; note|  y ; z|  # w|  ;v%%|  u >> {'a': 'x\ny ; z\nu'}
                # c|;c|a = #1|#b = 2|;b = 3 >> {'a': '#1'}
                a = x||# c|;d = 5|   |\ty|b = z >> {'a': 'x\ny', 'b': 'z'}
                a =|  x|b = >> {'a': '\nx', 'b': ''}
                a = \"\"|b=\"x\" >> {'a': '', 'b': '"x"'}
                a = 1|  2|a = 3|  4 >> {'a': '3\n4'}
                a = 1|[T]|b = 2|[S] ; again [1]|c = 3 >> {'a': '1', 'c': '3'}
                a = x|  [T]|  b = 1 >> {'a': 'x\n[T]\nb = 1'}
                [DEFAULT]|b = 1|[S]|a = 2 >> {'a': '2'}'''):
            with self.subTest(text=text):
                self.load(f'{HEAD}[S]\n{lines_of(text)}')
                self.assertEqual(config_ini.s, ast.literal_eval(expected))
        for content in plain.rstrip(), plain.replace(b'\n', b'\r\n'), b'\xef\xbb\xbf' + plain:
            self.load(content)                      # as editors leave it
            self.assertEqual(config_ini.s, {'a': '1\nü', 'b': '2'})

    def assert_warned(self, text, expected=''):
        """There is one warning, of that line and with those words, or none."""
        with self.subTest(text=text):
            for word, lines in SHORTS.items():
                text = text.replace(word, lines)
            told = self.check(f'{HEAD}[ANNOUNCE]\n{lines_of(text)}')[3]
            self.assertEqual(len(told), bool(expected), told)
            line, *words = expected.split('|')
            for word in (f't.ini:{line}: ', *words) * len(told):
                self.assertIn(word, told[0])

    def test_surprises_are_warned_of(self):
        for text, expected in sides(SURPRISES):
            self.assert_warned(text, expected)
        for key in """jobs jobs. jobs.queue jobs.queue. Job queue schedule log_level handler
                active""".split():
            self.assert_warned(f'[TORQUE]|{key} = 1', '6|job.NAME.PARAM, as in job.queue.active')
        for key in """job.b.c grace jobs.b.active queue.active active dry_run downloading_max
                scgi_url""".split():
            self.assert_warned(f'[INFLUXDB]|{key} = 1', f'6|{key}|InfluxDB|belongs under [TORQUE]')

    def test_config_ini_beside_is_read_first(self):
        self.write('config.ini', """\
            [GLOBAL]
            scgi_url = scgi://common:1
            rtorrent_rc = /rc
            other = %(x)s
            [INFLUXDB]
            url = http://common
            user = me
            [ANNOUNCE]
            PBT = http://a/
            [OTHER]
            no setting
            """)
        config = config_ini
        self.load('[INFLUXDB]\nurl = http://own\n')
        self.assertEqual((config.engine.address.host, config.torque.rtorrent_rc), ('common', '/rc'))
        self.assertNotIn('other', config.torque)
        self.assertEqual((config.influxdb, config.announce),
                         ({'url': 'http://own', 'user': 'me'}, {'PBT': 'http://a/'}))
        self.assertIn('config.ini is read first, for [GLOBAL] scgi_url', config.remarks[0][1])
        self.load(HEAD)
        self.assertEqual((config.engine.address.path, len(config.remarks)), ('/nowhere', 1))
        self.write('config.ini', '[INFLUXDB]\nurl = %(x)s\n')
        self.fails('config.ini:2: url: | interpolated', self.load, HEAD, kind=Mistakes)
        self.write('config.ini', b'\xff')
        self.load(HEAD)
        self.assertIn("config.ini: no text: 'utf-8'", config.remarks[0][1])

    def test_only_modest_files_are_read(self):
        pipe = self.path('pipe')
        os.mkfifo(pipe)
        for path, word in ((pipe, 'no regular file'), ('/dev/zero', 'no regular file'),
                           (self.folder, 'no regular file'), (pipe + 's', 'No such file'),
                           (self.write('large', '#' * 1048577), 'up to 1.0 MiB')):
            self.fails(word, config_ini.load, path, kind=Mistakes)

    def test_secrets_stay_out_of_messages(self):
        for text in ('password hunter2', 'password = x ;hunter2=1', 'token = hunter2%(x)s',
                     'scgi_url = https//me:hunter2@127.0.0.1/RPC2', 'job.x.API-KEY = x ;hunter2=',
                     'token = hunter1\nhunter2', 'scgi_url = http://me:hun\nhunter2@host',
                     'job.a.ping_url = https://me:hunter2@h/', 'password = hunter2 %(x)s',
                     'token = a\n  grace=hunter2', 'job.b.args = ls ; curl -u me:hunter2@h',
                     'scgi_url =\n  http://me:hunter2@h\n  ftp:/',
                     'job.b.handler = torque:Command\njob.b.schedule = 1h\njob.b.args = ls\n'
                     'job.b.env = PW=x,hunter2'):
            with self.subTest(text=text):
                status, out, err, _ = self.check(f'{HEAD}{text}\n')
                self.assertNotIn('hunter2', out + err)
                self.assertRegex(err, r't\.ini:\d')

    def test_many_jobs_are_quick(self):
        text = ''.join(f'job.x{number}.active = yes\n' for number in range(800))
        with mock.patch('difflib.get_close_matches', return_value=[]) as compare, \
                self.assertRaises(Mistakes):
            self.load(HEAD + text)
        pairs = sum(len(list(call.args[1])) for call in compare.call_args_list)
        self.assertLess(pairs, 10000)


class ConfigTest(ConfigCase):
    def test_pyrocore_ini_loads(self):
        status, out, err, told = self.check(textwrap.dedent('''\
            [TORQUE]
            scgi_url = /nowhere
            apscheduler.coalesce    = True
            httpd.download_url.x    =
                https://example.com/x.js
            ; v1.15
            job.queue.handler       = pyrocore.torrent.queue:QueueManager
            job.queue.startable     = is_ignored=0 message= prio>0
                    [ prio>2 OR [ NOT [ traits=audio kind_25=jpg,png,tif,bmp ] ] ]
            queue_startable_base    = is_open=no is_active=no is_complete=no
            job.connstats.handler   = pyrocore.torrent.jobs:EngineStats
            job.fluxstats.handler   = pyrocore.torrent.jobs:InfluxDBStats
            job.fluxstats.active    = True
            job.fluxstats.series    = ""
            ;job.fluxstats.
            job.treewatch.path      =
            job.treewatch.cmd.dir   = {{# set target path
                }}d.directory.set="/srv/{{traits.get('show', '_')}}"{{#
            [GLOBAL]
            sort_fields = name,alias
            [FORMATS]
            default = $(name)s
            [XMLRPC]
            log = print
            [TRAITS_BY_ALIAS]
            jamendo.com = audio
            [SWEEP_RULES_CUSTOM]
            seeded.prio = 200
            [INFLUXDB]
            url = http://localhost:8086/
            user = root
            password = root
            timeout = 0.250
            '''))
        self.assertEqual((status, told, err.count(' INFO ')), (0, [], 1))
        self.assertRegex(err, r'INFO config: .*: \[FORMATS\] \[GLOBAL\] \[SWEEP_RULES_CUSTOM\] '
                              r'\[TRAITS_BY_ALIAS\] \[XMLRPC\] apscheduler\.\* httpd\.\*\n')
        self.assertEqual(re.findall('(.*?) .*pyrocore', out), ['connstats', 'fluxstats'])
        settings = config_ini.torque
        self.assertEqual(settings['job.queue.startable'], 'is_ignored=0 message= prio>0\n'
                         '[ prio>2 OR [ NOT [ traits=audio kind_25=jpg,png,tif,bmp ] ] ]')
        self.assertEqual(settings['job.treewatch.cmd.dir'], '{{# set target path\n'
                         '''}}d.directory.set="/srv/{{traits.get('show', '_')}}"{{#''')

    def test_one_line_is_enough(self):
        for name, value, expected in (
                ('connstats', True, 'EngineStats'), ('connstats', False, None),
                ('fluxstats', True, 'InfluxDB'), ('queue', True, 'QueueManager')):
            jobs = self.load(f'[torque]\njob.{name}.active = {value}', 'scgi_url=/nowhere')
            self.assertEqual(expected and type(jobs[name]).__name__, expected)

    def test_job_sees_its_settings(self):
        text = GOOD_INI + (
            'job.a.schedule = 15\njob.a.Path = /srv\njob.a.number = 007\njob.a.on = Yes\n'
            'job.a.off = false\njob.a.size = 1.5\njob.a.empty =\njob.a.cmd.nfo = x=y\n'
            f'job.a.digits = {"9" * 5000}\n'
            'job.b.handler = good::Plain\njob.b.schedule = hour=3\njob.b.dry_run = on\n')
        jobs = self.load(text)
        config, other = jobs['a'].config, jobs['b'].config
        expected = {'Path': '/srv', 'number': 7, 'on': True, 'off': False, 'size': '1.5',
                    'empty': '', 'schedule': '15', 'path': None, 'job_name': 'a',
                    'dry_run': False, 'active': True, 'cmd.nfo': 'x=y', 'digits': '9' * 5000}
        self.assertEqual({name: config.get(name) for name in expected}, expected)
        self.assertEqual({name: getattr(config, name) for name in expected}, expected)
        self.assertEqual(('path' in config, other.dry_run, other.Path), (False, True, None))
        self.assertIs(type(jobs['a']), type(jobs['b']))
        self.assertTrue(self.load(text, dry_run=True)['a'].config.dry_run)

    def test_inactive_job_is_not_imported(self):
        for word in 'no', 'False', 'off', '0':
            text = f'{GOOD_INI}job.a.handler = none:X\njob.a.active = {word}'
            self.assertEqual(self.load(text), {})
        self.assertEqual(list(self.load(GOOD_INI + 'job.a.active = no', only='a')), ['a'])

    def test_config_ini_is_one_object(self):
        config = config_ini
        self.load(HEAD + 'grace = 1m\nOwn = 12\n[INFLUXDB]\nurl = http://x\n[Mine]\nKey = 1\n')
        self.assertIs(config_ini, config)
        self.assertEqual((config.torque.grace, config.torque.Own, config.torque.nothing,
                          config.influxdb.url, config.mine['Key']), (60, 12, None, 'http://x', '1'))
        self.load(HEAD)
        self.assertEqual((config.torque.grace, config.torque.Own, config.mine), (10, None, None))
        code = 'import torque; print(dict(torque.config_ini), torque.config_ini.engine)'
        self.assertEqual(subprocess.check_output([sys.executable, '-c', code], cwd=HERE).split(),
                         [b'{}', b'None'])

    def test_overrides_win(self):
        text = HEAD + 'grace = 5\n[Mine]\nkey = 1\n[INFLUXDB]\nurl = http://x\n'
        for override, expected in sides('''
                grace=7 >> torque grace 7
                torque.grace = 1m >> torque grace 60
                job.a.x==2 >> torque job.a.x '=2'
                own= >> torque own \'\'
                influxdb.url=y >> influxdb url 'y'
                mine.key=2 >> mine key '2\''''):
            name, key, value = expected.split()
            with self.subTest(override=override):
                self.load(text, override, 'job.a.active=no')
                self.assertEqual(config_ini[name][key], ast.literal_eval(value))
        for override, word in (('grace', 'KEY = VALUE'), ('=1', 'KEY = VALUE'),
                               ('grace=x', "grace: 'x'"), ('job.a.active=x', "active: 'x'")):
            self.assert_refused(GOOD_INI, 0, word, override=[override])

    def test_settings_of_torque_hold_for_jobs(self):
        job = 'job.b.handler = good:Does\njob.b.schedule = 1h\n'
        other = job.replace('.b.', '.c.') + 'job.c.scgi_url = scgi://host:5000\n'
        other += other.replace('.c.', '.d.')
        for text, expected in sides('''
                >> False False False 1
                same_files = yes >> True True False 1
                job.b.same_files = yes >> False True False 2
                same_files = yes|job.b.same_files = >> True True False 1
                same_files = yes|job.b.same_files = no >> True False False 2
                dry_run = yes >> False False True 1
                OTHER >> False False False 2'''):
            with self.subTest(text=text):
                jobs = self.load(GOOD_INI + job + lines_of(text.replace('OTHER', other)))
                a, b = jobs['a'].config, jobs['b'].config
                same_files = a.engine.same_files, b.engine.same_files
                self.assertEqual((bool(a.same_files), bool(b.same_files)), same_files)
                found = (*same_files, a.dry_run, len(b.engines))
                self.assertEqual(found, tuple(map(ast.literal_eval, expected.split())))
                self.assertEqual((list(a.engines), a.dry_run), (list(b.engines), b.dry_run))
        self.assertIs(a.engine, config_ini.engine)
        self.assertEqual(jobs['c'].engine.address.port, 5000)
        self.assertIs(jobs['c'].engine, jobs['d'].engine)
        self.load(GOOD_INI + job + other, only='a')
        self.assertEqual(len(config_ini.jobs[0].config.engines), 2)

    def test_example_shows_every_option(self):
        path = os.path.join(HERE, 'torque.ini.example')
        if not os.path.exists(path):
            self.skipTest('torque.ini.example is not there yet')
        text = open_text(path)
        shown, section = collections.defaultdict(list), ''      # (section, key) -> values
        for title, key, value in re.findall(
                r'(?m)^(?:\[(\w+)\]|;?([\w.-]+) *= *(.*?))(?:[ \t]+;.*)?$', text):
            section = title or section
            shown[section, key].append(value)
            if key.endswith('.handler') and value:
                shown[value].append(key[:-len('handler')])      # job.NAME.
        wanted = [('TORQUE', '', option) for option in torque.TORQUE_OPTIONS]
        wanted += [('TORQUE', 'job.NAME.', option) for option in torque.CORE_OPTIONS]
        for job in BUILT_IN.values():
            prefix, = shown[f'torque:{job.__name__}']
            wanted += [(job.section, prefix, option) for option in job.options]
        for section, prefix, option in wanted:
            with self.subTest(section=section, prefix=prefix, option=option.name):
                values = shown['TORQUE', prefix + option.name]
                self.assertIn(str(option.default),
                              values + shown[section or 'TORQUE', option.name])
        self.assertEqual(self.check(text + '\n[TORQUE]\nscgi_url = /nowhere\n')[::3], (0, []))


class BrokenIniTest(ConfigCase):
    # A setting of job a, in line 6 >> the words told; | separates words, and lines of an ini.
    JOB = r'''
        active = maybe >> 'maybe' is neither yes nor no|yes no true false
        active = >> is empty; allowed are yes and no
        active = "" >> is empty
        dry_run = 2 >> '2' is neither
        max_runtime = long >> 'long'|15s
        max_runtime = 5 5 >> '5 5'
        log_level = loud >> 'LOUD'|DEBUG INFO WARNING ERROR
        scgi_url = here >> 'here'|scgi://host:port
        scgi_url = scgi://h:p >> scgi://h:p
        schedule = >> job.a.schedule: is missing
        x = %(y)s >> nothing is interpolated
        schedule = minute=61 >> minute '61' is not in 0-59
        schedule = 0s >> '0s'
        schedule = minuet=1 >> 'minuet'|did you mean 'minute'?
        schedule = now and then >> 'now and then'
        schedule = minute >> 'minute'
        schedule = year=2001 >> year=2001|never fire
        schedule = hour=5-61 >> '61'
        schedule = "minute=1 >> "minute=1
        schedule = minute=* jitter=x >> 'x'
        schedule = minute=* timezone=No/Where >> No/Where
        schedule = @often >> @often
        schedule = month=2 day=30 >> month=2 day=30|never fire
        schedule = minute=*/5 # often >> ; # begins a comment only at the start of a line
        active = yes\t#x >> ; # begins a comment only
        active = "yes" >> ; values stand without quotes
        handler = 'good:Plain' >> ; values stand without quotes
        '''
    # Lines of [TORQUE] from 6 on >> the line, the words told.
    TORQUE = r'''
        foo bar >> 6 neither KEY = VALUE nor [SECTION]
        = 5 >> 6 neither
        [OPEN >> 6 neither
        foo|  more >> 6 neither
        b ; c=1 >> 6 neither
        [] >> 6 neither
        ||\x1b[31m = 1 >> 8 neither
        job = 1 >> 6 job.NAME.PARAM
        job.b = 1 >> 6 job.NAME.PARAM
        job..c = 1 >> 6 job.NAME.PARAM
        job.b. = 1 >> 6 job.NAME.PARAM
        grace = soon >> 6 grace: 'soon'|15s
        grace = 5|grace = -1 >> 7 grace: '-1'
        rpc_timeout = x >> 6 rpc_timeout: 'x'
        rpc_timeout = 0 >> 6 rpc_timeout: '0' leaves no time for anything; allowed are
        rpc_limit = big >> 6 rpc_limit: 'big'|100m
        scgi_url = >> 6 scgi_url: is not set
        scgi_url = here >> 6 scgi_url: 'here'|a socket path
        scgi_url = ftp://me:hunter2@h/ >> 6 ftp://me:***@h/|http(s)://
        job.b.handler = good:Plain >> 6 job.b.schedule: is missing
        job.b.schedule = 5s >> 6 job.b: has no handler; a job needs a handler and a schedule
        job.a.handler = >> 6 job.a: has no handler
        |job.queue.handler =|job.queue.active = yes >> 7 job.queue: has no handler
        job.quue.active = yes >> 6 job.quue: has no handler; did you mean 'queue'?
        job.Queue.room = 1g|job.Queue.active = yes >> 6 did you mean 'queue'?
        job.tidy.active = no|job.tidy.handler = good:Plain|job.tydy.x = 1 >> 8 mean 'tidy'?
        grace = 5 # five >> 6 grace: '5 # five'|; # begins a comment only at the start of a
        rpc_limit = "64m" >> 6 rpc_limit: '"64m"'|; values stand without quotes
        ||job.b.x = 1|job.b.handler = good:Plain >> 9 job.b.schedule: is missing
        [S]|b = 1|  -%(home)s- >> [78] b: |interpolated
        job.queue.active = >> 6 job.queue.active: is empty
        job.connstats.active=1|job.connstats.shedule = 5s >> 7 no such option; did you mean 'sch
        job.connstats.active=1|job.connstats.colour = red >> 7 colour|no such option
        '''
    # A setting of fluxstats or [INFLUXDB] >> the words told.
    FLUX = r'''
        dbnam = x >> no such option; did you mean 'dbname'?
        buffer = many >> 'many'|0
        gzip = perhaps >> 'perhaps'
        timeout = x >> 'x'|15s
        timeout = 0s >> '0s' leaves no time
        tags = x >> is not understood|=
        api = 4 >> '4'|1 2 3
        url = http://me:hunter2@x/ >> http://me:***@x/
        '''
    # Whole files >> the line, the words told.
    FILES = r'''
        x = 1|[TORQUE]|scgi_url = /x|job.connstats.active = no >> 1 x: stands before any [SECTION]
        timeout = 1|[TORQUE]|scgi_url = /x|job.connstats.active = yes >> 1 before any [SECTION]
        job.b.c = 1|[TORQUE]|scgi_url = /x|job.connstats.active = no >> 1 job.b.c: stands before
        |# c|[TORQUE| >> 3 neither
        \xff\xfe[\0T\0 >> - utf-8
        >> - scgi_url|.rtorrent.rc|.config/rtorrent/rtorrent.rc
        [TORQUE]|rtorrent_rc = /nowhere| >> 2 scgi_url|/nowhere
        [TORQUE]|scgi_url = /x|job.treewatch.active = yes >> 3 job.treewatch.path: is not set
        '''

    def test_every_mistake_is_told(self):
        for text, words in sides(self.JOB):
            name = text.split()[0]
            self.assert_refused(f'{GOOD_INI}job.a.{lines_of(text)}', 6, f'job.a.{name}: |{words}')
        for text, words in sides(self.TORQUE):
            self.assert_refused(GOOD_INI + lines_of(text), *words.split(' ', 1))
        for text, words in sides(self.FLUX):
            for place, line in ('job.fluxstats.', '[67]'), ('[INFLUXDB]\n', '[68]'):
                if not text.startswith('url'):
                    line = line[2]
                self.assert_refused(f'{GOOD_INI}job.fluxstats.active = yes\n{place}{text}\n',
                                    line, f'{text.split()[0]}|{words}')
        for text, words in sides(self.FILES):
            self.assert_refused(lines_of(text).encode('latin-1'), *words.split(' ', 1))

    def test_all_are_told_at_once(self):
        self.ini(GOOD_INI + 'foo bar\njob.a.active = maybe\njob.connstats.active = yes\n'
                 'job.connstats.b = 1\njob.connstats.a = 1\ngrace = x\njob.b.handler = none:X\n'
                 'job.b.schedule = 0s\n  job.c.a = 1\njob.c.a = %(x)s\njob.c.active = no\n')
        status, out, err = self.command('-c', 't.ini')
        self.assertEqual((status, out), (78, ''))
        self.assertIn(' WARNING config: t.ini:13: job.b.schedule: job.c.a below is indented,', err)
        lines = [int(line) for line in re.findall(r'(?m)^t\.ini:(\d+): ', err)]
        self.assertEqual(sorted(lines), [6, 7, 9, 10, 11, 12, 13, 15])
        self.assertEqual(lines, sorted(lines))          # so one goes through the file once


class HandlerTest(ConfigCase):
    def test_old_names_are_ours(self):
        for handler, ours in sides('''
                torque::Action >> Action
                pyrocore.torrent.jobs:EngineStats >> EngineStats
                pyrocore.torrent.jobs::InfluxDBStats >> InfluxDB
                pyrocore.torrent.queue:QueueManager >> QueueManager
                pyrocore.torrent.watch:TreeWatch >> TreeWatch
                pyrosimple.job.metrics:EngineStats >> EngineStats
                pyrosimple.job.action::ItemCommand >> ItemCommand
                pyrosimple.job.move_path:PathMover >> Move'''):
            self.gives(torque.import_handler, (handler, getattr(torque, ours)))

    def test_bad_handlers_are_explained(self):
        for name, text in (('broken', 'x = 1\ndef broken(:\n    pass\n'), ('pack/__init__', ''),
                           ('needy', '\n\nimport absent_thing\n'), ('pack/inner', 'import needy\n'),
                           ('quits', 'import sys\nsys.exit(5)\n'), ('raises', '\n{}["key"]\n')):
            self.write(f'{name}.py', text)
        for handler, words in sides('''
                good >> 'good' is no handler|module.path:ClassName
                good.Plain >> 'good.Plain' is no handler
                :Plain >> is no handler
                good: >> 'good:' is no handler
                .good:Plain >> '.good:Plain' is no handler
                goood:Plain >> No module named 'goood'
                good.sub:Plain >> No module named 'good.sub'
                pack.absent:X >> No module named 'pack.absent'
                good:Plane >> module 'good' has no class 'Plane'; did you mean 'Plain'?
                good::plane >> module 'good' has no class 'plane'
                good:value >> module 'good' has no class 'value'
                torque:EngineStat >> no class 'EngineStat'; did you mean 'EngineStats'?
                pyrocore.torrent.jobs:EngineStat >> did you mean 'EngineStats'?
                broken:X >> module 'broken' cannot be imported: |broken.py:2:
                needy:X >> 'needy' cannot be imported: |needy.py:3: |'absent_thing'
                pack.inner:X >> 'pack.inner' cannot be imported: |needy.py:3:
                quits:X >> 'quits' cannot be imported: |quits.py:2: |SystemExit
                raises:X >> 'raises' cannot be imported: |raises.py:2: KeyError: 'key'
                '''):
            self.assert_refused(f'{GOOD_INI}job.a.handler = {handler}\n', 6,
                                f'job.a.handler: |{words}')

    def test_bad_initializers_are_explained(self):
        line = GOOD_PY.splitlines().index('            exec(config.code)') + 1
        for start, word in sides(r'''
                NoRun >> has no run()
                Inherits >> has no run()
                Async >> run() is async or holds a yield
                AsyncYields >> run() is async or
                Yields >> run() is async or
                Asks >> run() is called without arguments: missing a required argument: 'x'
                AsksNamed >> argument: 'x'
                NoSelf >> run() is called without arg
                InitAsks >> super().__init__(config), which this __init__() does not call
                Plain|job.a.path = >> job.a: job.a.path is not set
                Starts|job.a.code = raise torque.UserError("odd", 5) >> job.a: ('odd', 5)
                Starts|job.a.code = raise torque.LoggableError("no luck") >> no luck
                Starts|job.a.code = {}["key"] >> good.py:LINE: KeyError: 'key'
                Starts|job.a.code = sys.exit(3) >> good.py:LINE: SystemExit: 3
                Starts|job.a.code = raise ValueError("a\\nb\\x1b") >> good.py:LINE: ValueError
                '''):
            self.assert_refused(f'{GOOD_INI}job.a.handler = good:{lines_of(start)}', '[67]',
                                f'job.a|{word}'.replace('LINE', str(line)))

    def test_sample_of_readme_works(self):
        text = open_text(os.path.join(HERE, 'README')).partition('Writing a job\n')[2]
        module, ini = re.findall(r'(?m)(?:^    .*\n|^\n(?=    ))+', text)[:2]
        self.write('myjobs.py', module)
        ini = HEAD + textwrap.dedent(ini)
        for line, free, words in (
                ('', 1 << 50, ''), ('', 1 << 20, 'nearly full'),
                ('job.space.least = 1m', 2 << 20, '')):
            with self.subTest(line=line, free=free), mock.patch(
                    'shutil.disk_usage', return_value=types.SimpleNamespace(free=free)):
                job = self.load(ini.replace('job.space.path = /srv', line))['space']
                job.engine = mock.Mock()
                if words:
                    self.fails(words, job.run)
                else:
                    job.run()
                self.assertTrue(self.logged('INFO space: ', f'{free} bytes free'))
        self.assert_refused(f'{ini}job.space.lest = 1\n', 8, "mean 'least'")

    def test_unusual_jobs_are_made(self):
        text = GOOD_INI.replace('Plain', 'Unusual') + (
            'job.b.handler = good:NoSuper\njob.b.schedule = 1h\njob.b.code = pass\n')
        for job in self.load(text).values():
            job.run()

    def test_initializer_without_that_of_job(self):
        for code in 'self.engine', 'self.LOG', 'self.dry_run', 'self.config', 'self.torrents()':
            with self.subTest(code=code):
                self.ini(f'{GOOD_INI.replace("Plain", "NoSuper")}job.a.code = {code}\n')
                status, _, err = run_torque(*RUN, cwd=self.folder)
                self.assertIn('ERROR a: AttributeError: config, LOG, engine and dry_run are set by '
                              'super().__init__(config), which this __init__() does not', err)

    def test_absent_rtorrent_is_no_mistake(self):
        with self.assertRaisesRegex(Unreachable, 'no such socket'):
            self.load(f'{GOOD_INI}job.a.handler = good:Starts\n'
                      'job.a.code = torque.config_ini.engine.reach()\n')

    def test_mistakes_found_late_name_their_line(self):
        for settings, words in sides('''
                Action|matcher = *|action = tag|args = {{nme}} >> 8 job.a.args: |'name'
                Action|matcher = *|action = prio|args = 9 >> 8 job.a.args: |allowed are 0 1 2 3
                Command|args = echo "a >> 6 job.a.args: |No closing
                ItemCommand|matcher = *|cwd = /|args = echo {{nme}} >> 8 job.a.args: |'name'
                Move|matcher = *|sort = name|target = /x/{{nme}} >> 8 job.a.target: |'name'
                TreeWatch|path = FOLDER|cmd.b = 1 >> 7 '1' is no
                TreeWatch|path = FOLDER|cmd.b = {{if x >> 7 job.a.cmd.b:
                TreeWatch|path = : >> 6 job.a.path: |is not set
                Command|args = a > b # c >> 6 > is for a shell|; # begins a comment only
                Action|matcher = *|action = prio|args = "2" >> 8 ; values stand without quotes'''):
            handler, *lines = settings.replace('FOLDER', self.folder).split('|')
            lines = [f'job.a.{line}\n' for line in ('schedule = 1h', *lines)]
            self.assert_refused(f'{HEAD}job.a.handler = torque:{handler}\n{"".join(lines)}',
                                *words.split(' ', 1))

    def test_options_may_be_read_by_any_function(self):
        self.write('reads.py', """\
            import torque
            class Job(torque.Job):
                options = torque.Option('n', int, '5', ''), torque.Option('x', float, '0.5', '')
                def run(self): pass
            """)
        text = HEAD + 'job.a.handler = reads:Job\njob.a.schedule = 1h\njob.a.'
        config = self.load(text + 'n = 7')['a'].config
        self.assertEqual((config.n, config.x), (7, 0.5))
        for line, words in sides("""
                n = abc >> job.a.n: invalid literal|'abc'
                n = >> job.a.n: |''
                x = 1,5 >> job.a.x: |'1,5'"""):
            self.assert_refused(text + line, 6, words)

    def test_fields_of_a_module_are_known_to_all(self):
        self.write('adds.py', '''\
            import torque
            torque.TORRENT_FIELDS['piece'] = torque.TorrentField('number', ('d.size_chunks',))
            class Job:
                def __init__(self, config): pass
                def run(self): pass
            ''')
        self.ini(HEAD + 'job.a.handler = torque:Action\njob.a.schedule = 1h\njob.a.action = log\n'
                 'job.a.matcher = piece>0\njob.b.handler = adds:Job\njob.b.schedule = 1h\n')
        for words in (['--check'], ['--run-once', 'a']):
            self.assertNotIn('no field', ''.join(map(str, self.command('-c', 't.ini', *words))))

    def test_torque_is_the_running_program(self):
        self.ini(DOES + 'self.LOG.info([torque is __main__, isinstance(self, __main__.Job), '
                 'config_ini.engine is self.engine, config_ini is __main__.config_ini])\n')
        status, _, err = self.command(*RUN)
        self.assertEqual((status, err.count('True')), (0, 4), err)

    def test_folder_shadows_nothing(self):
        for name in 'csv', 'gzip', 'shlex':         # imported by a job, when needed, at start
            self.write(f'{name}.py', 'raise Exception("shadowed")\n')
        self.ini(DOES + 'import csv, gzip, shlex\n')
        shutil.copy(torque.__file__, self.folder)
        for program in torque.__file__, 'torque.py':
            with self.subTest(program=program):
                done = subprocess.run([sys.executable, program, *RUN], cwd=self.folder,
                                      stderr=subprocess.PIPE)
                self.assertEqual((done.returncode, done.stderr[20:]), (0, b'INFO a: cleaned\n'))


# --- Daemon --------------------------------------------------------------------------------------

WITNESS = '''
import os, sys, time, torque

class Tick:
    """Marks what happens to it, with both clocks, in NAME.marks beside the ini."""

    def __init__(self, config):
        self.config = config
        self.folder = os.path.dirname(torque.config_ini.path)
        self.stream = open(os.path.join(self.folder, config.job_name + '.marks'), 'a')
        self.mark('made')
        self.wait(config.slow)
        if config.refuse:
            raise torque.UserError('refused')

    def mark(self, word):
        os.write(self.stream.fileno(), f'{word} {time.monotonic()} {time.time()}\\n'.encode())

    def wait(self, name):
        while name and not os.path.exists(os.path.join(self.folder, name)):
            time.sleep(0.005)

    def run(self):
        self.mark('run')
        self.wait(self.config.hang)
        if self.config.hang:
            self.mark('over')
        if self.config.fail:
            raise torque.LoggableError(self.config.fail)
        if self.config.ask:
            self.mark('pid-%d' % self.config.engine.open().system.pid(''))
        exec(self.config.code or '')

    def cleanup(self):
        self.mark('cleanup')
        self.stream.close()
        self.wait(self.config.hung_cleanup)
'''


def max_gap(times):
    """Return the longest pause between moments."""
    return max(after - before for before, after in zip(times, times[1:]))


def memory_of(program):
    """Return the bytes of memory that a process has."""
    text = open_text(f'/proc/{program.process.pid}/status')
    return int(re.search(r'VmRSS:\s+(\d+)', text)[1]) << 10


class DaemonFolder(Folder):
    """A folder with an ini whose job `tick` marks its runs, four a second."""

    def setUp(self):
        super().setUp()
        self.write('witness.py', WITNESS)
        self.pid_file = PidFile(f'{self.folder}/state/torque.pid')
        self.addCleanup(self.kill)
        self.ini()

    def kill(self):
        if self.pid_file.is_locked():
            wait_for(self.is_told, seconds=5)
            os.kill(self.pid(), signal.SIGKILL)
            wait_for(lambda: not self.pid_file.is_locked())

    def is_told(self):
        """Tell whether the daemon tells its status; it does not while it starts over."""
        with contextlib.suppress(LoggableError):
            return self.ask()

    def pid(self):
        return self.ask()['pid']

    def ini(self, text='', tick='every 0.25s', state='state'):
        self.ini_path = self.write('torque.ini', (
            f'[TORQUE]\nscgi_url = {self.folder}/rpc.sock\nstate_dir = {self.folder}/{state}\n'
            'grace = 1s\nrpc_timeout = 0.5s\njob.connstats.active = no\n'
            f'job.tick.handler = witness:Tick\njob.tick.schedule = {tick}\n'
            + textwrap.dedent(text)))
        return self.ini_path

    def job(self, name, schedule='every 0.25s', **options):
        return f'job.{name}.handler = witness:Tick\njob.{name}.schedule = {schedule}\n' + ''.join(
            f'job.{name}.{key} = {value}\n' for key, value in options.items())

    def start(self, *words, **kwargs):
        """Start torque in the foreground, after the end of an earlier one; wait until it is up."""
        self.kill()
        program = self.ended(start_torque('-c', self.ini_path, *words, **kwargs))
        wait_for(lambda: program.seen('started with') or program.process.poll() is not None)
        self.assertTrue(program.seen('started with'), program.lines)
        return program

    def says(self, expected, words, *options, **kwargs):
        """Run torque to its end; check its exit status, and the words between bars that it says."""
        status, said = self.command(*options, **kwargs)
        self.assertEqual(status, expected, said)
        for word in words.split('|'):
            self.assertIn(word, said)
        return said

    def command(self, *words, **kwargs):
        """Run torque to its end; return exit status, and all it says."""
        status, out, err = run_torque('-c', self.ini_path, *words, **kwargs)
        return status, ''.join(line for line in (out + err).splitlines(True)
                               if 'runs as root' not in line)

    def marks(self, name='tick', word='run', clock=1):
        """Return when a job marked a word: in elapsed (1) or Unix (2) seconds."""
        rows = map(str.split, open_text(f'{self.folder}/{name}.marks').splitlines())
        return [float(row[clock]) for row in rows if re.fullmatch(word, row[0])]

    def more(self, name='tick', word='run', count=1):
        """Wait until a job has marked a word some more times, of which there are four a second."""
        before = len(self.marks(name, word))
        wait_for(lambda: len(self.marks(name, word)) >= before + count, seconds=20 + count)

    def give_to_nobody(self):
        """Let nobody own the folder."""
        need('setpriv')
        if os.geteuid() or subprocess.call(['setpriv', '--reuid=65534', '--clear-groups',
                                            sys.executable, '-c', ''], stderr=-3):
            self.skipTest('only root may be nobody, who has to reach this Python')
        os.makedirs(f'{self.folder}/state', exist_ok=True)
        for path in (self.folder, f'{self.folder}/state'):
            os.chown(path, 65534, 65534)

    def daemon(self):
        """Return a daemon that is not started, in this process."""
        config = mock.Mock(path=self.ini_path, state_dir=self.folder, engines={}, jobs=[])
        config.torque.grace = 1
        return torque.Daemon(config, self.pid_file)

    def ask(self):
        return self.pid_file.ask(20)

    def reload(self):
        """Reload as --reload does; return exit status, and what is told."""
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            return torque.reload(self.pid_file), told.getvalue()

    def assert_reloaded(self):
        self.assertEqual(self.reload(), (0, 'reloaded\n'))

    def assert_refused(self, *words):
        status, told = self.reload()
        self.assertEqual(status, 78, told)
        for word in words:
            self.assertIn(word, told)

    def state(self, name):
        return {job['name']: job for job in self.ask()['jobs']}[name]


class DaemonControlTest(DaemonFolder):
    def test_runs_in_progress_may_end(self):
        self.ini(self.job('w', '1h', hang='go'))
        for number in signal.SIGTERM, signal.SIGINT:
            program = self.start('-D', 'grace=1h')
            wait_for(lambda: self.state('w')['state'] == 'running')
            program.process.send_signal(number)
            program.wait('stopping', 'w')
            program.process.terminate()         # which is not Ctrl-C: it hurries nothing
            self.assertIsNone(program.process.poll())
            self.write('go', '')
            self.assertEqual(program.stop(0), 0)
            marks = [line.split()[0] for line in open_text(self.path('w.marks')).splitlines()]
            self.assertEqual(marks[-4:], ['made', 'run', 'over', 'cleanup'])
            os.remove(self.path('go'))
        self.assertEqual(len(self.marks(word='cleanup')), 2)

    def test_hung_run_is_left(self):
        self.ini(self.job('w', '1h', hang='never'))
        for grace, number, more, told in (          # it runs out; Ctrl-C ends it
                ('0.2s', 0, '', 'w'), ('1h', signal.SIGINT, '', 'w'),
                ('1h', signal.SIGINT, 'never', 'tick, w')):
            program = self.start('-D', f'grace={grace}', '-D', f'job.tick.hung_cleanup={more}')
            wait_for(lambda: self.state('w')['state'] == 'running')
            program.process.terminate()
            program.wait('stopping', 'w')
            self.assertEqual(program.stop(number), 0)
            self.assertTrue(program.seen(f'cut short: {told}'))
        self.assertEqual([len(self.marks(name, 'cleanup')) for name in ('w', 'tick')], [0, 3])

    def test_hung_cleanup_is_left(self):
        self.ini(self.job('w', hung_cleanup='never'))
        program = self.start('-D', 'grace=1h')
        self.more('w')
        program.process.send_signal(signal.SIGINT)
        wait_for(self.marks, 'w', 'cleanup')
        self.assertEqual(program.stop(signal.SIGINT), 0)
        self.assertTrue(program.seen('cut short: w'))

    def test_hung_runs_are_told_to_end(self):
        self.write('witness.py', WITNESS + (
            "    def end_run(self):\n        self.mark('end_run')\n"
            "        raise OSError(28, 'No space left on device')\n"))
        self.ini(self.job('w', '1h', hang='never') + 'grace = 0.1s\n')
        program = self.start()
        wait_for(lambda: self.state('w')['state'] == 'running')
        self.assertEqual(program.stop(), 0)
        self.assertTrue(program.seen('ERROR w: end_run failed: ', 'No space left'), program.lines)
        self.assertEqual([len(self.marks(*at)) for at in (('w', 'end_run'), ('tick', 'cleanup'))],
                         [1, 1])

    def test_nothing_ends_the_daemon(self):
        bad = {'bug': r'raise ValueError("a\nb\x1b[2J")', 'exit': 'sys.exit(3)',
               'luck': 'raise torque.LoggableError("no luck")', 'key': 'raise KeyboardInterrupt',
               'end': 'raise GeneratorExit'}
        self.ini(''.join(self.job(name, '1h', code=code) for name, code in bad.items())
                 + 'job.connstats.active = yes\njob.connstats.schedule = 0.1s\n')
        program = self.start()
        for line in (r'ERROR bug: ValueError: a\x0ab\x1b[2J', 'ERROR exit: SystemExit: 3',
                     'WARNING luck: no luck', 'ERROR key: KeyboardInterrupt',
                     'ERROR end: GeneratorExit', 'WARNING engine: '):
            program.wait(line)
        self.more(count=2)
        self.assertEqual(program.stop(), 0)
        self.assertEqual([len(program.seen(word)) for word in (
            'Traceback', 'no luck', 'no such socket')], [4, 1, 1])
        self.assertEqual([len(self.marks(name, 'cleanup')) for name in bad], [1] * 5)
        self.assertNotIn('\x1b', ''.join(program.lines))

    def test_forked_children_keep_nothing(self):
        self.write('forks.py', '''\
            import os, time
            class Job:
                def __init__(self, config):
                    self.folder = os.path.dirname(__file__)
                    self.fork()
                def fork(self):
                    if not os.fork():
                        os.closerange(0, 3)
                        time.sleep(60)
                        os._exit(0)
                def run(self):
                    self.fork()
                    open(self.folder + '/forked', 'w').close()
            ''')
        self.ini('job.f.handler = forks:Job\njob.f.schedule = 1h\n')
        program = self.start(start_new_session=True)
        self.addCleanup(os.killpg, program.process.pid, signal.SIGKILL)
        wait_for(os.path.exists, f'{self.folder}/forked')
        program.stop(signal.SIGKILL)
        self.assertFalse(self.pid_file.is_locked())

    def test_ends_beside_threads_and_children(self):
        self.write('busy.py', '''\
            import concurrent.futures, multiprocessing, os, threading, time, torque
            def hang():
                os.closerange(0, 3)
                time.sleep(60)
            class Pool:
                def __init__(self, config):
                    self.pool = concurrent.futures.ThreadPoolExecutor(1)
                def run(self):
                    self.pool.submit(time.sleep, 60)
            class Child:
                def __init__(self, config):
                    pass
                def run(self):
                    multiprocessing.get_context('fork').Process(
                        target=hang, daemon=True).start()
            class Refused:
                def __init__(self, config):
                    threading.Thread(target=time.sleep, args=(60,)).start()
                    raise torque.UserError('refused')
            ''')
        for name in ('Pool', 'Child'):
            with self.subTest(name):
                self.ini(f'job.b.handler = busy:{name}\njob.b.schedule = 1h\n')
                program = self.start()
                wait_for(lambda: self.state('b')['runs'])
                self.assertEqual(program.stop(seconds=20), 0)
        self.ini('job.b.handler = busy:Refused\njob.b.schedule = 1h\n')
        self.says(78, 'job.b: refused', '--daemon')
        wait_for(lambda: not self.pid_file.is_locked())

    def test_other_files_are_no_pid_file(self):
        note, fifo, link = self.write('note', 'milk'), self.path('fifo'), self.path('link')
        os.mkfifo(fifo)
        os.symlink(note, link)
        for path in (note, fifo, link):
            self.says(78, path, '--pid-file', path)
        self.assertEqual(open_text(note), 'milk')
        self.says(78, '', '--status', '--pid-file', fifo)

    def test_pid_file_that_goes_is_made_again(self):
        self.start()
        daemon = self.daemon()
        self.addCleanup(lambda: daemon.server and daemon.server.close())
        self.assertFalse(self.pid_file.keep())
        self.kill()
        self.assertTrue(self.pid_file.keep())
        self.addCleanup(lambda: os.close(self.pid_file.file))
        shutil.rmtree(f'{self.folder}/state')
        daemon.look_after_pid_file()
        self.assertEqual(open_text(self.pid_file.path), f'{os.getpid()}\n')
        self.assertEqual(self.ask()['pid'], os.getpid())
        shutil.rmtree(f'{self.folder}/state')
        other = PidFile(self.pid_file.path)
        self.assertTrue(other.keep())
        self.addCleanup(os.close, other.file)
        daemon.look_after_pid_file()
        self.assertEqual((daemon.exit_status, daemon.scheduler.stopping), (75, True))

    def serve_other(self, code, *words):
        """Have another process listen at the socket of the pid file, which it locks."""
        code = textwrap.dedent("""\
            import fcntl, os, socket, sys, time
            pid_file = open(sys.argv[1], 'w')
            fcntl.flock(pid_file, fcntl.LOCK_EX)
            pid_file.write(str(os.getpid())), pid_file.flush()
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(sys.argv[1] + '.sock')
            sock.listen()
            print('up', flush=True)
            while True:
                other = sock.accept()[0]
            """) + textwrap.indent(code, '    ')
        other = self.ended(Program([*words, sys.executable, '-c', code, self.pid_file.path]))
        other.wait('up')
        return other

    def test_odd_answers_hang_nothing(self):
        os.makedirs(f'{self.folder}/state')
        for code in ('pass', 'other.send(b"{}")', 'other.send(b"[" * 99999)', """\
                try:
                    while True:
                        other.send(b"7" * 99999)
                except OSError:
                    pass""", """\
                try:
                    while not time.sleep(0.1):
                        other.send(b"7")
                except OSError:
                    pass"""):
            with self.subTest(code):
                other = self.serve_other(textwrap.dedent(code))
                began = time.monotonic()
                self.fails('does not tell its status', self.pid_file.ask, 0.5)
                self.assertLess(time.monotonic() - began, 5)
                other.stop()
                os.remove(self.pid_file.socket)

    def test_nobody_else_is_ended(self):
        self.give_to_nobody()
        other = self.serve_other('other.close()', 'setpriv', '--reuid=65534', '--clear-groups')
        sock, pid = self.pid_file.connect(5)    # as root may
        sock.close()
        self.assertEqual(pid, other.process.pid)
        self.write('state/torque.pid', '1')
        self.fails('another user answers', self.pid_file.stop)
        os.chown(self.pid_file.path, 0, 0)
        self.write('state/torque.pid', str(other.process.pid))
        self.says(1, '', '--status')
        self.assertIsNone(other.process.poll())

    def test_jobs_are_made_while_rtorrent_is_away(self):
        self.write('eager.py', '''\
            import torque
            class Job(torque.Job):
                def __init__(self, config):
                    super().__init__(config)
                    self.proxy = self.engine.open()
                def run(self):
                    self.LOG.info('pid %s', self.proxy.system.pid(''))
            ''')
        self.ini('job.e.handler = eager:Job\njob.e.schedule = every 0.1s\n')
        program = self.start()
        wait_for(lambda: self.state('e')['failures'])
        self.ended(Server(Commands().scgi, self.path('rpc.sock')))
        program.wait(f'INFO e: pid {1 << 30}')

    def test_nothing_from_others_reaches_the_terminal_raw(self):
        self.ini(self.job('bad', fail='a\x1b[2Jb'))
        program = self.start()
        status = wait_for(lambda: self.state('bad')['failures'] and self.ask())
        status['rtorrent'][0]['version'] = '0.9\x1b[2J'
        engine = mock.Mock(version='0.9\x1b[2J')
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            torque.print_status(status)
            torque.check_engine(engine)
        self.assertEqual(told.getvalue().count('\\x1b[2J'), 3)
        self.assertNotIn('\x1b', told.getvalue() + ''.join(program.lines))

    def test_status_while_it_starts(self):
        self.ini(self.job('slow', slow='go'))
        program = self.ended(start_torque('-c', self.ini_path))
        wait_for(lambda: self.marks('slow', 'made') and self.pid_file.is_locked())
        self.assertEqual(self.command('--status'), (1, 'torque is starting\n'))
        self.assertIs(json.loads(self.command('--status', '--json')[1])['starting'], True)
        self.write('go', '')
        program.wait('started with')

    def assert_begins(self, word):
        status, said = self.command(word)
        self.assertEqual((status, said), (0, f'torque runs in the background, pid {self.pid()}, '
                                             f'log {self.path("state/torque.log")}\n'))

    def test_goes_into_the_background(self):
        self.assert_begins('--daemon')
        pid = self.pid()
        self.assertEqual(open_text(self.pid_file.path), f'{pid}\n')
        self.says(0, f'torque.ini, log {self.folder}/state/torque.log\n', '--status')
        self.says(75, '', '--daemon')
        self.assertEqual(self.command('--cron'), (75, ''))
        self.says(75, f'with pid {pid}', '--fg')
        self.ini(self.job('other'))
        self.assert_begins('--restart')
        self.assertNotEqual(self.pid(), pid)
        self.more('other')
        for text, words in (('oops', 'KEY = VALUE'), ('log_file = /dev/null/x', '/dev/null/x'),
                            ('job.treewatch.active = yes', 'treewatch.path: is not set')):
            self.ini(text)
            self.says(78, words, '--restart')       # no reason to end the one that runs
            self.more()
        self.assertEqual(self.command('--stop'), (0, ''))
        self.assertFalse(self.pid_file.is_locked())
        self.assertEqual(len(self.marks(word='cleanup')), 2)
        self.assertEqual(self.command('--stop'),
                         (69, f'torque is not running with {self.folder}/torque.ini: '
                              f'{self.pid_file.path} is not locked\n'))
        self.assertIn('stopped', open_text(f'{self.folder}/state/torque.log'))
        self.ini()
        self.assertEqual(self.command('--cron'), (0, ''))       # cron would mail it

    def test_errors_of_the_start_are_seen(self):
        for text, words in (('job.tick.refuse = yes', 'job.tick: refused'),
                            ('oops', 'KEY = VALUE'),
                            ('log_file = /dev/null/x', 'log file /dev/null/x: ')):
            with self.subTest(text):
                self.ini(text)
                self.says(78, words, '--daemon')
        self.assertFalse(self.pid_file.is_locked())

    def test_places_that_cannot_be_used_are_named(self):
        self.write('sitecustomize.py', '''\
            import errno, fcntl, os, pwd
            def flock(*args):
                raise OSError(errno.ENOLCK, 'No locks available')
            if os.environ.get('NO_LOCKS'):
                fcntl.flock = flock
            if 'HOME' not in os.environ:
                pwd.getpwuid = {}.__getitem__
            ''')
        env = {**os.environ, 'PYTHONPATH': self.folder}
        homeless = {name: value for name, value in env.items() if name != 'HOME'}
        every = '--check|--status|--stop|--daemon|--cron|'
        for setting, options, environ, words in (
                ('state_dir = /proc/nowhere', '--check|--cron', env, '/proc/nowhere|No such file'),
                ('state_dir = torque.ini', '--check|--daemon|--cron|', env,
                 '/torque.ini cannot be used: File exists'),
                ('pid_file = /proc/x.pid', '--daemon|--cron|', env, '/proc/x.pid|No such file'),
                ('pid_file = /proc/x.pid', '--check', env, '/proc cannot be used: No such file'),
                ('', every, {**env, 'NO_LOCKS': '1'}, '/state|No locks available'),
                ('state_dir =', every, homeless, "state': there is no such home folder|a whole"),
                ('state_dir = ~/x', every, homeless, "'~/x': there is no such home folder"),
                ('pid_file = ~nobody-here/x', '--check|--cron', env,
                 "'~nobody-here/x': there is no")):
            self.ini(setting)
            self.write('state/torque.pid', '')
            for option in options.split('|'):
                with self.subTest(setting=setting, option=option):
                    self.says(78, f'{words}|state_dir', *option.split(), env=environ)
        self.ini('state_dir = torque.ini')
        for option in '--status', '--stop':
            self.says(69, f'torque is not running with {self.folder}/torque.ini', option)
        self.assertFalse({'~', '.torque'} & {*os.listdir(), *os.listdir(self.folder)})

    def test_files_are_private(self):
        self.command('--daemon', '-D', 'job.tick.catch_up=yes', '-D', 'job.tick.schedule=second=*')
        for name in ('', '/torque.pid', '/torque.pid.sock', '/tick.start', '/torque.log'):
            path = f'{self.folder}/state{name}'
            mode = wait_for(lambda path=path: os.path.exists(path) and os.stat(path).st_mode)
            self.assertEqual(mode & 0o777, 0o600 if name else 0o700, path)

    def test_looking_never_hinders_a_start(self):
        ended = []

        def look():
            while not ended:
                self.pid_file.is_locked()
        looks = [threading.Thread(target=look) for _ in range(3)]
        for thread in looks:
            thread.start()
        kept = []
        for _ in range(50):
            other = PidFile(self.pid_file.path)
            kept.append(other.keep())
            os.close(other.file)
        ended.append(True)
        for thread in looks:
            thread.join()
        self.assertTrue(all(kept))

    @unittest.skipUnless(os.path.exists('/dev/full'), 'there is no /dev/full here')
    def test_output_that_cannot_be_written_is_one_line(self):
        for word in ('--check', '--list-jobs'):
            status, _, said = run_torque('-c', self.ini_path, word,
                                         prefix=['sh', '-c', 'exec "$0" "$@" >/dev/full'])
            self.assertEqual((status, said.splitlines()[-1]),
                             (1, 'torque: [Errno 28] No space left on device'))
            self.assertNotIn('Traceback', said)

    def test_only_the_holder_of_the_lock_is_ended(self):
        with subprocess.Popen(['sleep', '60']) as innocent:
            for text in (f'{innocent.pid}', '', '\0\0', '9' * 20):
                with self.subTest(text):
                    self.write('state/torque.pid', text)
                    self.says(69, '', '--stop')
                    program = self.start()
                    self.write('state/torque.pid', text)
                    self.assertEqual((self.command('--stop')[0], program.stop()), (0, 0))
            self.assertIsNone(innocent.poll())
            innocent.kill()

    def test_ends_without_the_ini(self):
        self.start('--pid-file', self.pid_file.path)
        os.remove(self.ini_path)
        self.says(78, '', '--stop')
        self.assertEqual(self.command('--stop', '--pid-file', self.pid_file.path), (0, ''))

    def test_ends_after_its_place_was_changed(self):
        program = self.start()
        self.ini(state='other')
        self.says(69, f'{self.folder}/other/torque.pid is not locked', '--stop')
        self.says(0, '', '--stop', '--pid-file', self.pid_file.path)
        self.assertEqual(program.stop(0), 0)

    def test_long_names_of_sockets_are_refused(self):
        self.ini(state='d' * 120)
        for words in ((), ('--status',)):
            status, said = self.command(*words)
            self.assertEqual((status, 'pid_file' in said, '107' in said), (78, True, True), said)

    def test_status_shows_jobs(self):
        self.assertEqual(self.command('--status', '--json'), (69, '{}\n'))
        self.ini(self.job('hang', hang='go', max_runtime='0.1s') + self.job(
            'bad', fail='no http://me:sesame@host/x ' + 60 * 'word ' + 'end'))
        program = self.start()
        wait_for(lambda: self.state('hang')['state'] == 'overdue' and self.state('bad')['failures'])
        said = self.says(1, '', '--status')
        self.assertRegex(said, rf'torque \S+, pid {program.process.pid}, up .*')
        self.assertRegex(said, r'(?m)^hang +overdue +\d.* \d\d:\d\d:\d\d')
        self.assertRegex(said, r'(?m)^bad .* no http://me:\*\*\*@host/x (word ){60}end$')
        self.assertRegex(said, r'(?m)^rTorrent at scgi.*rpc.sock: not asked yet')
        self.assertNotIn('sesame', f'{said} {program.lines}')
        said = self.says(1, '', '--status', '--json')
        self.assertEqual(json.loads(said)['pid'], program.process.pid)
        self.write('go', '')
        began = time.perf_counter()
        self.ask()
        self.assertLess(time.perf_counter() - began, 0.05)

    def test_log_is_rotated(self):
        path = self.write('log', b'x' * 99)
        log = torque.log_file_handler(path)
        self.addCleanup(log.close)
        log.maxBytes = 100
        record = logging.LogRecord('torque.x', 20, '', 0, 'a line', (), None)
        with mock.patch('os.rename', mock.Mock(side_effect=PermissionError)):
            log.emit(record)                    # its folder is closed: it goes on as it is
        self.assertEqual(open_text(path), 'x' * 99 + 'a line\n')
        log.emit(record)
        self.assertEqual((open_text(path), os.stat(path).st_mode & 0o777), ('a line\n', 0o600))

    def test_risks_are_told(self):
        self.ini('job.tick.scgi_url = scgi://192.0.2.1:5000\njob.w.handler = torque:TreeWatch\n'
                 f'job.w.schedule = hour=*\njob.w.path = {self.folder}/watch\n'
                 'job.x.handler = torque:EngineStats\njob.x.schedule = 1h\n'
                 '[INFLUXDB]\npassword = sesame\n')
        self.ended(Server(lambda sock: None, self.path('rpc.sock')))
        for path in 'watch', 'state', 'rpc.sock':
            if path != 'rpc.sock':
                os.makedirs(f'{self.folder}/{path}')
            os.chmod(f'{self.folder}/{path}', 0o777)
        program = self.start()
        risks = ['holds password and can be read by others: chmod 600', 'open to every user',
                 'watched, can be written by every user', 'may be open to the network',
                 'the state folder, can be written']
        if os.geteuid() == 0:
            risks.append('runs as root')
        for text in risks:
            self.assertEqual(len(program.seen('WARNING', text)), 1, program.lines)

    def test_secrets_are_not_shown(self):
        self.assertNotIn('hunter2', self.command('--check', '-D', 'influx.password=hunter2')[1])
        secrets = dict.fromkeys(('passwd', 'Secret', 'api_key', 'apiToken'), 'hunter2')
        self.assertNotIn('hunter2', repr(Settings(secrets)))
        self.ini('job.c.handler = torque:Command\njob.c.schedule = 1h\n'
                 'job.c.args = sh -c "exit 3" -u hunter2\n')
        status, said = self.command('--run-once', 'c')
        self.assertEqual((status, "'sh' ended with status 3" in said, 'hunter2' in said),
                         (1, True, False))

    def test_systemd_is_told(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(f'{self.folder}/notify')
            sock.settimeout(20)
            program = self.start(env={**os.environ, 'NOTIFY_SOCKET': f'{self.folder}/notify'})
            self.assert_reloaded()
            program.stop()
            self.assertEqual([sock.recv(100).split(b'\n')[0] for _ in range(4)],
                             [b'READY=1', b'RELOADING=1', b'READY=1', b'STOPPING=1'])

    def test_monitors_are_told(self):
        for url in ('http://me:hunter2@h/x', 'http://[bad/x', 'ftp://h/x', 'http://h/a b'):
            self.ini(f'ping_url = {url}')
            self.assertNotIn('hunter2', self.says(78, 'ping_url', '--check'))
        server = self.ended(WebServer(lambda connection, *_: connection.sendall(page(b''))))
        deaf = self.ended(Server(lambda connection: server.over.wait()))
        url = server.url

        def asked(*paths):
            return {*paths} <= {head.split()[1] for head, _ in server.requests}
        self.ini(f'ping_url = http://127.0.0.1:{deaf.port}/d\n'
                 + self.job('good', '1h', ping_url=url + '/good/?a=b')
                 + self.job('bad', '1h', fail='x', hang='go', ping_url=url + '/bad')
                 + self.job('none', ping_url=''))
        program = self.start()
        self.more(count=5)
        wait_for(asked, '/good/start?a=b', '/good?a=b', '/bad/start')
        program.process.terminate()
        program.wait('stopping')
        self.write('go', '')
        self.assertEqual(program.stop(), 0)
        self.assertTrue(asked('/bad/fail'))
        self.assertLess(max_gap(self.marks()), 0.7)


class ReloadTest(DaemonFolder):
    def test_everything_is_new_but_pid_and_lock(self):
        self.ini(self.job('old') + self.job('changed'))
        program = self.start()
        self.more('changed')
        self.ini(self.job('changed', number=2) + self.job('new'))
        self.write('witness.py', WITNESS.replace("mark('run')", "mark('other')"))
        self.assertEqual(self.command('--reload'), (0, 'reloaded\n'))
        self.more('new', 'other')
        self.more(word='other')
        self.assertEqual(self.pid(), program.process.pid)
        self.assertEqual(open_text(self.pid_file.path), f'{program.process.pid}\n')
        self.says(75, '')
        self.assertEqual([len(self.marks('old', word)) for word in ('made', 'cleanup')], [1, 1])
        self.assertEqual([job['name'] for job in self.ask()['jobs']], ['changed', 'new', 'tick'])
        self.assertTrue(program.seen('INFO main: reloaded with changed, new, tick'))
        self.assertEqual(program.stop(), 0)

    def test_runs_have_grace(self):
        self.ini(self.job('long', 'every 1h', hang='go')
                 + self.job('hung', 'every 1h', hang='never'))
        program = self.start()
        wait_for(lambda: self.marks('long') and self.marks('hung'))
        program.process.send_signal(signal.SIGHUP)
        program.wait('stopping; ', 'long')
        self.write('go', '')
        program.wait('reloaded with')
        self.assertTrue(program.seen('WARNING main: cut short by the reload: hung'), program.lines)
        for name, words in (('long', ['made', 'run', 'over', 'cleanup', 'made']),
                            ('hung', ['made', 'run', 'made'])):
            rows = open_text(f'{self.folder}/{name}.marks').splitlines()
            self.assertEqual([row.split()[0] for row in rows][:len(words)], words)

    def test_commands_are_ended_and_waited_for(self):
        self.write('stubborn.sh', f"""\
            trap "" TERM
            sleep 60 & echo $$ $! > {self.folder}/pids
            wait; wait
            """)
        self.ini('job.c.handler = torque:Command\njob.c.schedule = every 1h\n'
                 f'job.c.args = sh {self.folder}/stubborn.sh\n')
        self.start()
        pids = wait_for(open_text, f'{self.folder}/pids').split()
        self.ini()
        self.assert_reloaded()
        for pid in pids:
            state = open_text(f'/proc/{pid}/stat')
            self.assertTrue(not state or ' Z ' in state, state)
        self.assertFalse(os.path.exists(f'/proc/{pids[0]}'))

    def test_mistakes_change_nothing(self):
        program = self.start()
        good = open_text(self.ini_path)
        self.write('broken.py', 'oops oops')
        for text, words in (('oops', 'KEY = VALUE'),
                            ('job.x.handler = broken:Job\njob.x.schedule = 1h', 'broken.py'),
                            (None, 'No such file'), ('job.x.handler = wit', 'handler'),
                            ('job.treewatch.active = yes', 'job.treewatch.path: is not set'),
                            ('job.x.handler = torque:Command\njob.x.schedule = 1h', 'args: is not'),
                            ('state_dir = torque.ini', '/torque.ini cannot be used'),
                            ('pid_file = /proc/x.pid', '/proc cannot be used'),
                            ('\\0\\x1f', '')):
            with self.subTest(text):
                os.remove(self.ini_path) if text is None else self.write('torque.ini', good + text)
                self.assert_refused(words)
                wait_for(lambda words=words: program.seen('ERROR', 'not reloaded', words))
        self.assertEqual([job['name'] for job in self.ask()['jobs']], ['tick'])
        self.more()
        self.assertEqual(len(self.marks(word='made')), 1)
        self.write('torque.ini', good + 'grace = x')
        self.command('--reload')
        self.assertRegex(self.command('--status')[1],
                         r"(?m)^not reloaded: .*torque\.ini:\d+: grace: 'x' is not a length")
        self.write('torque.ini', good)
        self.assertEqual(self.command('--reload'), (0, 'reloaded\n'))
        self.assertNotIn('not reloaded', self.command('--status')[1])

    def test_dry_runs_are_told(self):
        self.ini(self.job('dry', dry_run='yes'))
        for words, told, dry in (([], 'with dry (dry run), tick', [True, False]),
                                 (['-n'], 'with dry (dry run), tick (dry run)', [True, True])):
            program = self.start(*words)
            self.assertTrue(program.seen(f'started {told}'), program.lines)
            self.assertEqual([job['dry_run'] for job in self.ask()['jobs']], dry)
            said = self.command('--status')[1]
            self.assertEqual([bool(re.search(rf'(?m)^{name} +\w+, dry run', said))
                              for name in ('dry', 'tick')], dry)

    def test_broken_torque_changes_nothing(self):
        copy = shutil.copy(torque.__file__, f'{self.folder}/torque.py')
        program = self.ended(Program([sys.executable, copy, '-c', self.ini_path]))
        program.wait('started with')
        good = open_text(copy)
        for text, words in (('oops oops\n', 'SyntaxError'), ('import sys; sys.exit(7)\n', '7')):
            self.write('torque.py', text)
            self.assert_refused(words)
        self.write('torque.py', good.replace("VERSION = '1.0'", "VERSION = '7.7'"))
        self.assert_reloaded()
        self.assertEqual(self.ask()['version'], '7.7')

    def test_job_that_refuses_ends_it_and_says_so(self):
        self.says(0, '', '--daemon')
        self.ini('log_file = /dev/null/x\n')
        self.assert_refused('log file /dev/null/x: ')
        self.ini('job.tick.refuse = yes\n')
        self.says(1, 'the daemon has ended', '--reload')
        self.assertIn('job.tick: refused', open_text(f'{self.folder}/state/torque.log'))

    def test_check_that_hangs_is_ended(self):
        self.write('slow.py', 'import os, time\nopen("/proc/self/fd/2", "w").write('
                   'f"pid {os.getpid()}")\nopen(os.path.dirname(__file__) + "/began", "w").write('
                   'str(os.getpid()))\ntime.sleep(60)')
        program = self.start()
        self.ini('job.s.handler = slow:Job\njob.s.schedule = 1h\n')
        program.process.send_signal(signal.SIGHUP)
        child = wait_for(open_text, f'{self.folder}/began')
        self.more(count=3)
        self.assertIs(self.ask()['reloading'], True)
        self.assertEqual(program.stop(), 0)
        wait_for(lambda: not os.path.exists(f'/proc/{child}'))

    def test_folder_that_a_job_goes_to_is_not_looked_in(self):
        self.write('other/torque.ini', 'oops')
        self.ini(self.job('w', code=f'os.chdir("{self.folder}/other")'))
        self.ended(start_torque('-c', 'torque.ini', cwd=self.folder))
        wait_for(lambda: len(self.marks('w')) > 1)
        self.assert_reloaded()
        self.assertEqual(self.ask()['config'], os.path.realpath(self.ini_path))

    def test_hung_cleanups_hold_nothing_up(self):
        self.ini(self.job('a', hung_cleanup='never'))
        program = self.start()
        began = time.monotonic()
        self.assert_reloaded()
        self.assertEqual(program.stop(), 0)
        self.assertLess(time.monotonic() - began, 8)
        self.assertEqual(len(self.marks('a', 'cleanup')), 2)
        self.assertTrue(program.seen('cut short: a'))


class ByteCodeTest(DaemonFolder):
    def setUp(self):
        super().setUp()
        self.program = shutil.copy(torque.__file__, self.folder)
        self.write('looks.py', """\
            import json, sys, torque
            class Job(torque.Job):
                def __init__(self, config):
                    same = torque is sys.modules['__main__']
                    with open(f'{config.state_dir}/found', 'w') as stream:
                        json.dump([torque.__file__, sys.argv, sys.path, same], stream)
                def run(self):
                    pass
            """)
        self.ini('job.l.handler = looks:Job\njob.l.schedule = every 1h\n')

    def run_it(self, *flags, cwd=None, script=None, forbidden=''):
        """Run a daemon; return the words of its process, what a job finds, and the version."""
        program = self.ended(Program(
            [sys.executable, *flags, script or self.program, '-c', self.ini_path], cwd=cwd,
            env={**os.environ, 'PYTHONDONTWRITEBYTECODE': forbidden}))
        program.wait('started with')
        words = open_text(f'/proc/{program.process.pid}/cmdline').split('\0')[:-1]
        found, told = json.loads(open_text(f'{self.folder}/state/found')), self.ask()
        self.assertEqual(program.stop(), 0, program.lines)
        return words, found, told['version']

    def test_everything_is_found_as_before(self):
        for flags, cwd, script in (((), None, None), (('-u', '-X', 'dev'), None, None),
                                   ((), self.folder, 'torque.py')):
            words, (file, argv, path, same), _ = self.run_it(*flags, cwd=cwd, script=script)
            self.assertEqual(words[:-3], [sys.executable, *flags])
            self.assertRegex(words[-3], r'/__pycache__/torque\..*\.pyc$')
            self.assertEqual(words[-2:], ['-c', self.ini_path])
            self.assertEqual((file, argv, same),
                             (self.program, [self.program, '-c', self.ini_path], True))
            self.assertIn(self.folder, path)
            self.assertNotIn('pycache', str(path))

    def test_forbidden_or_impossible_it_goes_on_as_it_is(self):
        self.assertIn(self.program, self.run_it('-B')[0])
        self.assertIn(self.program, self.run_it(forbidden='1')[0])
        self.write('__pycache__', '')
        self.assertIn(self.program, self.run_it()[0])

    def test_stale_byte_code_is_not_run(self):
        self.assertEqual(self.run_it()[2], '1.0')
        before = os.stat(self.program)
        self.write('torque.py', open_text(self.program).replace("VERSION = '1.0'",
                                                                "VERSION = '7.7'"))
        os.utime(self.program, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.assertEqual(self.run_it()[2], '7.7')


class CatchUpTest(DaemonFolder):
    def test_missed_runs_happen_once(self):
        year = time.gmtime().tm_year
        self.ini(''.join(self.job(name, f'year={year - 1}-{year + 9} month=1 day=1', catch_up=way)
                         for name, way in (('made-up', 'yes'), ('told', 'no'), ('new', 'yes'))))
        for name in 'made-up', 'told':
            os.utime(self.write(f'state/{name}.start', ''), (9e8, 9e8))
        for missed in True, False, False:
            program = self.start()
            self.more(count=2)
            wait_for(lambda: len(self.marks('made-up')) == 1)
            self.assertEqual(
                bool(program.seen('not running: made-up (made up for now), told')), missed)
            program.stop()
            os.utime(self.path('state/told.start'), (2e9, 2e9))         # a clock was wrong
        self.assertFalse(self.marks('told') or self.marks('new'))

    def planned(self, schedule='hour=3', **options):
        config = Settings({'job_name': 'a/b', **options}, state_dir=self.folder)
        return torque.PlannedJob('a', None, config, parse_schedule(schedule), {})

    def test_only_rare_starts_are_kept(self):
        for schedule, options, kept in (
                ('hour=3', {}, 'a_b.start'), ('year=1999', {}, 'a_b.start'),
                ('hour=3 minute=0,5', {}, 'a_b.start'), ('minute=0-50', {}, ''),
                ('minute=0-8', {}, 'a_b.start'), ('minute=*/10', {}, ''),
                ('second=*', {'catch_up': True}, 'a_b.start'), ('second=*', {}, ''),
                ('1d', {'catch_up': True}, ''), ('hour=3', {'dry_run': True}, '')):
            with self.subTest(schedule, **options):
                path = torque.start_file(self.planned(schedule, **options))
                self.assertEqual(os.path.basename(path), kept)

    def test_full_disks_are_told_once(self):
        daemon = self.daemon()
        for _ in range(9):
            daemon.mark_start('/dev/null/a.start')
        self.assertEqual(len(self.logged('/dev/null/a.start')), 1)


class UnitFileTest(Folder):
    def test_systemd_takes_units_of_readme(self):
        if not shutil.which('systemd-analyze'):
            self.skipTest('systemd-analyze is not installed')
        readme = open_text(os.path.join(HERE, 'README'))
        units = re.findall(r'(?ms)^    \[Unit\].*?WantedBy=\S+', readme)
        self.assertEqual(len(units), 2)
        for kind, unit in zip(('--user', '--system'), units):
            unit = re.sub(r'\S+/torque\.py', torque.__file__, textwrap.dedent(unit))
            path = self.write(f'torque{kind}.service', unit.replace('User=rtorrent', 'User=daemon'))
            done = subprocess.run(['systemd-analyze', 'verify', kind, path], timeout=60,
                                  stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                  env={**os.environ, 'XDG_RUNTIME_DIR': self.folder})
            told = [line for line in done.stderr.decode().splitlines() if 'torque' in line]
            self.assertEqual((done.returncode, told), (0, []), done.stderr)


class FaultTest(DaemonFolder):
    """Every fault, under the real program, whose other jobs have to go on."""

    @contextlib.contextmanager
    def fault(self, program, gap=2.0):
        """Watch torque during a fault: other jobs are on time, memory and log do not grow."""
        self.more(count=2)
        before, began = memory_of(program), self.marks()[-1]
        yield
        self.more(count=3)
        self.assertLess(max_gap([at for at in self.marks() if at >= began]), gap)
        self.assertIsNone(self.state('tick')['last_error'])
        wait_for(lambda: memory_of(program) - before < 8 << 20)     # a run may have some now
        self.assertLess(len(program.lines), 100)

    def asking(self, jobs=1):
        """Start torque with jobs that ask rTorrent four times a second."""
        self.ini(''.join(self.job(f'ask{number or ""}', ask='yes') for number in range(jobs)))
        return self.start()

    def rtorrent(self, folder='', command=None):
        return self.ended(RTorrent(self.path(folder), command))

    def answered(self, server, job='ask'):
        self.more(job, f'pid-{server.process.pid}')

    def told(self, program, *words):
        self.assertEqual([len(program.seen(word)) for word in ('WARNING engine', 'answers again')],
                         list(words), program.lines)

    def test_rtorrent_restarts(self):
        """Later as another version."""
        first, second = self.rtorrent(), self.rtorrent('second', RTORRENTS[-1])
        version = second.engine.stats().version
        program = self.asking()
        with self.fault(program):
            self.answered(first)
            os.replace(second.url, first.url)           # the socket is another's all at once
            self.answered(second)
            self.told(program, 0, 0)
            self.assertEqual(self.ask()['rtorrent'][0]['version'], version)
            for server in first, second:
                server.stop(signal.SIGKILL)
            program.wait('WARNING engine')
            self.answered(self.rtorrent())
        self.told(program, 1, 1)

    def test_late_rtorrents_are_noticed(self):
        self.ini('job.stats.handler = torque:EngineStats\njob.stats.schedule = hour=*\n')
        program, path = self.start(), self.path('rpc.sock')
        program.wait('WARNING engine')
        with self.fault(program):
            hung = self.ended(Server(plays(b'', silent=True), path))
            wait_for(lambda: hung.connections, seconds=5)
            self.more(count=8)                          # one that hangs holds nothing up
            hung.end()
            os.remove(path)
            double = Commands()
            self.ended(Server(double.scgi, path))
            wait_for(program.seen, 'answers again', seconds=6)
            asked = len(double.seen)
            self.more(count=20)
            self.assertEqual(len(double.seen), asked)
        self.told(program, 1, 1)

    def test_answers_are_bad(self):
        head = scgi_answer(b'')[:-8] + b'9' * 9 + b'\r\n\r\n'
        for name, jobs, answer in (
                ('mute', 50, plays(b'', silent=True)),
                ('garbage', 1, plays(os.urandom(9999), silent=True)),
                ('half a reply', 1, plays(scgi_answer('x' * 999)[:500], silent=True)),
                ('huge reply', 1, plays(head, flood=400, silent=True)),
                ('slow', 1, plays(b'', slowly=b'Status: 200 OK and more', silent=True))):
            with self.subTest(name):
                server = self.ended(Server(answer, self.path('rpc.sock')))
                program = self.asking(jobs)
                with self.fault(program):
                    wait_for(lambda: self.state('ask')['failures'])
                    server.end()
                    os.remove(server.url)
                program.stop()

    def test_names_do_not_resolve(self):
        self.ini(self.job('ask', ask='yes', scgi_url='scgi://no.such.host.invalid:5000')
                 + 'job.m.handler = torque:InfluxDB\njob.m.schedule = every 0.25s\n'
                 'job.m.url = http://no.such.host.invalid:8086\nping_url = http://nowhere.invalid')
        with self.fault(self.start()):
            wait_for(lambda: self.state('ask')['failures'] and self.state('m')['failures'])

    def test_disk_is_full(self):
        disk = self.disk('state', 'size=64k')

        def fill():
            with contextlib.suppress(OSError), open(f'{disk}/x', 'ab', 0) as stream:
                while True:
                    stream.write(bytes(512))
        fill()
        self.ini(self.job('s', 'second=*', catch_up='yes') + f'log_file = {disk}/log')
        self.says(0, '', '--daemon')
        program = mock.Mock(lines=[])
        program.process.pid = self.pid()
        with self.fault(program):
            self.more('s')
            self.assertEqual(open_text(f'{disk}/torque.pid'), '')
            os.remove(f'{disk}/x')
            self.more('s', count=2)
            self.assert_reloaded()
            program.lines = wait_for(open_text, f'{disk}/log').splitlines()
            fill()
        self.says(0, '', '--stop')

    def test_reloads_leak_nothing(self):
        program = self.start()

        def used():
            proc = f'/proc/{program.process.pid}'
            return len(os.listdir(proc + '/fd')), len(os.listdir(proc + '/task'))
        before = used()
        with self.fault(program):
            for text, status in (('', 0), ('oops', 78)) * 3:
                self.ini(text)
                self.assertEqual(self.reload()[0], status)
        wait_for(lambda: max(map(int.__sub__, used(), before)) <= 0)

    def test_four_start_at_once(self):
        programs = [self.ended(start_torque('-c', self.ini_path)) for _ in range(4)]
        wait_for(lambda: sum(program.process.poll() == 75 for program in programs) == 3)
        winner, = [program for program in programs if program.process.poll() is None]
        with self.fault(winner):
            self.assertEqual(self.pid(), winner.process.pid)

    def test_ends_while_it_starts_or_reloads(self):
        for option, word, number, status in (
                ('slow', 'made', signal.SIGTERM, -signal.SIGTERM),
                ('slow', 'made', signal.SIGINT, 1),
                ('hang', 'run', signal.SIGTERM, 0)):
            with self.subTest(option, number=number):
                path = self.ini(self.job(option, **{option: 'never'}))
                program = self.ended(start_torque('-c', path))
                wait_for(self.marks, option, word)
                if option == 'hang':            # the run in progress has its grace by now
                    program.process.send_signal(signal.SIGHUP)
                    program.wait('stopping')
                began = time.monotonic()
                self.assertEqual(program.stop(number), status)
                self.assertLess(time.monotonic() - began, 2.2)
                self.assertEqual(program.seen('Traceback'), [])
                os.remove(self.path(f'{option}.marks'))

    def test_kills_lose_no_run(self):
        code = 'self.mark("at-%d" % os.stat(self.config.state_file("start")).st_mtime)'
        self.ini(self.job('s', 'second=*', catch_up='yes', code=code))
        for _ in range(20):
            program = start_torque('-c', self.ini_path)
            threading.Event().wait(random.uniform(0.05, 0.7))
            program.stop(signal.SIGKILL)
        with self.fault(self.start()):
            self.more('s', 'at-.*', count=2)
        seconds = re.findall(r'at-(\d+)', open_text(f'{self.folder}/s.marks'))
        self.assertEqual(len(seconds), len(set(seconds)), 'a run happened twice')

    def test_clock_steps(self):
        library = '/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1'
        if not os.path.exists(library):
            self.skipTest('libfaketime is not installed')
        self.ini(self.job('s', 'second=*'))
        program = self.start(env={
            **os.environ, 'LD_PRELOAD': library, 'DONT_FAKE_MONOTONIC': '1',
            'FAKETIME_NO_CACHE': '1', 'FAKETIME_TIMESTAMP_FILE': self.write('clock', '+0')})
        self.more('s')
        for step in '+1d', '-1d':
            before = len(self.marks('s')) - 1
            with self.subTest(step), self.fault(program):
                self.write('clock', step)
                self.more('s', count=3)
            times = self.marks('s')[before:]
            # One that misses the step stands still for 30 s, or a day.
            self.assertLess(max_gap(times), 10)
            self.assertLess(len(times), 2.9 + times[-1] - times[0])

    def test_files_run_out(self):
        import resource
        program = self.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE,
                                                                   (32, 32)))
        with self.fault(program, gap=3):
            socks = [socket.socket(socket.AF_UNIX) for _ in range(35)]
            for sock in socks:
                sock.settimeout(0.1)
                with contextlib.suppress(OSError):
                    sock.connect(self.pid_file.socket)
            self.more(count=5)
            program.process.send_signal(signal.SIGHUP)
            self.more(count=2)
            for sock in socks:
                sock.close()
            wait_for(lambda: self.is_told() and not self.ask()['reloading'])
            self.assert_reloaded()

    def test_reload_without_open_files(self):
        import resource
        self.write('holds.py', """\
            import contextlib, os, signal, threading, time, torque
            class Job(torque.Job):
                def run(self):
                    # With older Pythons the C library opens a file when the first one ends.
                    thread = threading.Thread(target=int)
                    thread.start()
                    while os.path.exists(f'/proc/self/task/{thread.native_id}'):
                        time.sleep(0.005)
                    go, held = os.path.dirname(__file__) + '/go', []
                    with contextlib.suppress(OSError):
                        while not os.path.exists(go):
                            held.append(os.dup(0))
                    if held:
                        os.kill(os.getpid(), signal.SIGHUP)
                    while not os.path.exists(go):
                        time.sleep(0.005)
                    for fd in held:
                        os.close(fd)
            """)
        self.ini('job.h.handler = holds:Job\njob.h.schedule = 1h\n')
        program = self.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE,
                                                                   (64, 64)))
        program.wait('not reloaded: the files cannot be checked')
        self.more()
        self.write('go', '')
        wait_for(lambda: self.is_told() and self.state('h')['runs'])
        self.assert_reloaded()

    def test_standard_streams_are_closed(self):
        words = [sys.executable, torque.__file__, '-c', self.ini_path, '--daemon']
        self.assertEqual(subprocess.call(['sh', '-c', 'exec "$0" "$@" <&- >&- 2>&-', *words]), 0)
        program = mock.Mock(lines=[])
        program.process.pid = wait_for(self.is_told)['pid']
        with self.fault(program):
            self.assert_reloaded()
            self.says(75, '', '--daemon')

    def test_terminal_goes(self):
        import fcntl
        import pty
        import termios
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, torque.__file__, '-c', self.ini_path], stdin=slave,
            stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        self.addCleanup(process.wait)
        self.addCleanup(self.kill)
        os.close(slave)
        wait_for(self.marks)
        with self.fault(mock.Mock(lines=[], process=process)):
            os.close(master)
            self.more(count=3)


# --- Web -----------------------------------------------------------------------------------------

# What pyrosimple's RtorrentExporter asks of an rTorrent, beside view.size, trackers and versions
EXPORTED = '''
    network.http.current_open network.http.max_open network.max_open_files network.max_open_sockets
    network.open_files network.open_sockets network.total_handshakes pieces.memory.block_count
    pieces.memory.current pieces.memory.max pieces.memory.sync_queue pieces.preload.min_rate
    pieces.preload.min_size pieces.preload.type pieces.stats.total_size
    pieces.stats_not_preloaded pieces.stats_preloaded pieces.sync.queue_size startup_time
    system.files.closed_counter system.files.failed_counter system.files.opened_counter
    throttle.global_down.max_rate throttle.global_down.rate throttle.global_down.total
    throttle.global_up.max_rate throttle.global_up.rate throttle.global_up.total
    throttle.max_downloads.global throttle.max_uploads.global throttle.unchoked_downloads
    throttle.unchoked_uploads'''.split()
SHOWN_NAMES = ('<script>document.title = "owned"<!--', '"><img src=x onerror=alert(1)>',
               "'); alert(1); ('", '&lt;b&gt; &amp;', '<style>*{display:none}', '{{name}} %s',
               'marks \u202egnp.exe \u2066\u200f', 'long ' + 'W' * 10000)


class HistoryTest(Folder):
    def setUp(self):
        super().setUp()
        self.history = self.load()

    def load(self):
        return torque.History(self.path('history.json'))

    def known(self, name='up'):
        """Return minutes before now -> figure, of those that are known."""
        curve = self.history.curves.get(name, ())
        return {len(curve) - 1 - at: figure for at, figure in enumerate(curve)
                if figure == figure}

    def add(self, *minutes):
        for minute in minutes:
            self.history.add(minute, {'up': minute})

    def test_a_day_is_kept(self):
        self.add(*range(3000))
        self.assertEqual(self.known(), {ago: 2999 - ago for ago in range(1440)})

    def test_gaps_are_gaps(self):
        self.add(100, 101, 105, 106)
        self.history.add(107, {'down': 1})
        self.assertEqual(self.known(), {1: 106, 2: 105, 6: 101, 7: 100})
        data = torque.path_data(self.history.curves['up'][-8:], 128)
        self.assertEqual(data.count('M'), 2)
        self.history.add(107 + 5000, {'down': 2})
        self.assertEqual([*self.history.curves], ['down'])
        self.assertEqual(self.known('down'), {0: 2})

    def test_clock_is_set_back(self):
        self.add(100, 101, 50, 51)
        self.assertEqual(self.known(), {0: 51, 1: 50, 2: 101, 3: 100})
        self.history.add(51, {'up': 7})         # the same minute once more
        self.assertEqual(self.known()[0], 7)

    def test_it_is_kept_over_a_restart(self):
        self.history.add(100, {'up': 1, 'free': 2 ** 40})
        self.history.add(101, {'free': 2 ** 40 + 2 ** 30})
        self.history.save()
        self.assertEqual(os.stat(self.history.path).st_mode & 0o777, 0o600)
        self.history = self.load()
        self.history.add(103, {'up': 2})
        self.assertEqual(self.known(), {0: 2, 3: 1})
        self.assertEqual(self.known('free'), {2: 2 ** 40 + 2 ** 30, 3: 2 ** 40})

    def test_any_file_will_do(self):
        for text in ('', '[' * 100000, *'''{} [] 7 null \xff {"curves":{}}
                {"curves":{"up":5},"minute":1} {"curves":[],"minute":1}
                {"curves":{"up":[1]},"minute":1e999}
                {"curves":{"up":[1]},"minute":null}'''.split()):
            with self.subTest(text[:40]):
                self.write('history.json', text)
                self.history = self.load()
                self.assertEqual((self.history.curves, self.history.minute), ({}, 0))
        self.write('history.json', json.dumps({'minute': 2 ** 70, 'curves': {
            'up': ['<b>', None, {}, -1, 10 ** 400, float('inf'), float('nan'), True, 5]}}))
        self.history = self.load()
        self.history.add(100, {'up': 6})
        self.assertEqual(self.known(), {0: 6, 1: 5, 2: 1})


class PageTest(Folder):
    """A page of a daemon that does not run, beside a double of rTorrent."""

    def setUp(self):
        super().setUp()
        self.answers = {'d.multicall2': []}     # command -> what it answers, else 0
        server = self.ended(Server(self.answer))
        self.connections = server.connections
        self.engine = torque.Engine(server.url, 5)
        self.engine.aliases = {}
        settings = {'httpd.host': '127.0.0.1', 'httpd.password': '', 'httpd.active': True}
        config = mock.Mock(path='torque.ini', state_dir=self.folder, jobs=[],
                           engines={1: self.engine}, torque=torque.Settings(settings, grace=1),
                           influxdb=torque.Settings(disk_path=self.folder))
        self.page = torque.Page(torque.Daemon(config, mock.Mock()))
        self.figures, = self.page.engines.values()

    def answer(self, connection):
        calls = torque.xml_reply(Server.request(connection)
                                 .replace(b'methodCall>', b'methodResponse>')
                                 .replace(b'<methodName>system.multicall</methodName>', b''))
        known = [*torque.METRICS, 'view.size', 'system.listMethods']
        about = {'system.listMethods': known, 'view.list': ['main', 'my "view"\\'],
                 'system.client_version': '0.9.8', 'system.library_version': '0.13.8',
                 'session.path': '', 'system.cwd': ''}
        connection.sendall(scgi_answer(xml_answer([
            [{**about, **self.answers}.get(call['methodName'], 0)] for call in calls])))

    def asked(self, function, *args):
        """Return how many round trips a call costs rTorrent."""
        before = len(self.connections)
        function(*args)
        return len(self.connections) - before

    def test_folder_of_rtorrent_may_be_below_home(self):
        self.engine.same_files = True
        self.answers['directory.default'] = '~/dl'
        self.page.measure(60)
        self.assertEqual([*self.page.folders.values()], [os.path.expanduser('~/dl')])
        self.assertEqual([*self.page.disks()], [self.folder])      # that one is not there yet

    def test_disks_are_those_that_jobs_measure(self):
        os.mkdir(self.path('own'))
        for make, disk_path, shown in ((torque.InfluxDB, self.path('own'), self.path('own')),
                                       (torque.InfluxDB, '', self.folder),
                                       (print, self.path('own'), self.folder)):
            self.page.config.jobs = [torque.PlannedJob(
                'f', make, Settings(disk_path=disk_path), None, {})]
            self.assertEqual([*self.page.disks()], [shown])

    def test_a_scrape_costs_one_round_trip(self):
        self.assertEqual(self.asked(self.page.metrics), 0)      # it is not even known yet
        self.page.measure(60)
        self.assertEqual(self.asked(self.page.metrics), 0)
        for ago, trips in ((4.0, 0), (5.0, 1), (0.0, 0)):
            self.figures.asked = torque.elapsed_time() - ago
            self.assertEqual(self.asked(self.page.metrics), trips, ago)
            self.assertEqual(self.asked(self.page.html), 0, ago)

    def test_one_that_is_away_is_asked_each_minute(self):
        self.page.measure(60)
        self.engine.gone_since = torque.elapsed_time()
        self.engine.stamp = None
        self.figures.asked = -100
        self.assertEqual(self.asked(self.page.metrics), 0)
        self.assertRegex(self.page.metrics(), r'(?m)^rtorrent_up\{.*\} 0$')
        self.assertIn('class="bad"', self.page.html())
        self.page.measure(120)
        self.assertRegex(self.page.metrics(), r'(?m)^rtorrent_up\{.*\} 1$')

    def test_a_hung_one_holds_up_one_request(self):
        self.page.measure(60)
        self.figures.asked = -100
        with self.figures.lock:
            began = time.monotonic()
            self.assertIn('rtorrent_up{', self.page.metrics())
        self.assertLess(time.monotonic() - began, 30)

    def test_history_is_measured(self):
        self.answers.update({'throttle.global_up.rate': 1000, 'throttle.global_down.rate': -5})
        start = 1700000000
        for minute in range(5):
            self.page.measure(start + 60 * minute)
        self.engine.gone_since = torque.elapsed_time()
        curves, where = self.page.history.curves, self.engine.address.where
        self.assertEqual([*curves[f'up {where}'][-5:]], [1000] * 5)
        self.assertNotIn(f'down {where}', curves)
        self.assertGreater(curves[f'free {self.folder}'][-1], 0)
        page = self.page.html()
        self.assertEqual(page.count('<svg'), 4)
        self.assertIn(time.strftime('%H:%M', time.localtime(start // 60 * 60 + 240)), page)

    def test_no_label_for_a_torrent(self):
        rows = [['', [[f'http://host{number}.example{number}.org/x', 1]]] for number in range(300)]
        rows += [['failed', [['http://one.org/', 1]]], ['', [['http://one.org/', 1]]]]
        self.answers['d.multicall2'] = rows[::-1]
        self.page.measure(60)
        text = self.page.metrics()
        self.assertLess(text.count('rtorrent_tracker_torrents{'), 110)
        self.assertRegex(text, r'rtorrent_tracker_torrents\{.*,tracker="one.org"} 2')
        self.assertRegex(text, r'rtorrent_tracker_message_torrents\{.*,tracker="one.org"} 1')
        self.assertIn(r'view="my \"view\"\\"} 0', text)

    def test_nonsense_is_no_figure(self):
        for value in ('<script>', [], {}, -1, 2 ** 63 - 1, [[]], [['', 5]], [[None]]):
            with self.subTest(value=value):
                self.answers = dict.fromkeys([*torque.METRICS, 'd.multicall2', 'view.size',
                                              'directory.default'], value)
                self.engine.stamp = None
                self.figures.asked = -100
                self.page.measure(60)
                self.assertNotIn('<script>', self.page.html() + self.page.metrics())

    def test_no_disk_and_no_figures(self):
        self.page.config.influxdb.update(disk_path='/nowhere')
        with mock.patch('shutil.disk_usage', side_effect=OSError(5, 'away')):
            page = self.page.html()
        self.assertIn('no figures yet', page)
        self.assertNotIn('Disk of', page)

    def test_text_is_escaped_and_ends(self):
        for name in (*SHOWN_NAMES, '</pre><script>', 'http://me:secret@host/x', '\ud800', '\0'):
            with self.subTest(name[:40]):
                shown = torque.markup(name)
                self.assertLess(len(shown), 2000)
                self.assertNotRegex(shown, r'[<>"\'\0]|secret')
                shown.encode()

    def test_log_is_shown(self):
        log = logging.getLogger('torque.x')
        for number in range(30):
            log.info('line %d', number)
        log.warning('<b>bad</b>\nsecond')
        self.page.tail.emit(logging.LogRecord('x', 30, '', 1, '%d', ('nonsense',), None))
        page = self.page.html()
        self.assertNotRegex(page, r'line 8\b')
        self.assertIn('line 29', page)
        self.assertIn('<span class="bad">&lt;b&gt;bad&lt;/b&gt;</span>\n<span class="bad">second',
                      page)

    def test_names_of_others_are_refused(self):
        name = socket.gethostname()
        for host in f'''localhost localhost:8042 LocalHost 127.0.0.1:1 [::1]:5 192.168.0.7 {name}
                {name.upper()}:80'''.split():
            self.gives(self.page.is_served, (host, True))
        for host in ('', '127.0.0.1\n', *'''evil.example evil.example:8042 localhost.evil.example
                127.0.0.1.evil.example a@localhost localhost:8042:1 [evil]'''.split()):
            self.gives(self.page.is_served, (host, False))
        self.assertEqual(self.page.respond('/', {})[0], 421)

    def status(self, login, path='/'):
        return self.page.respond(path, {'Host': 'localhost', 'Authorization': login})[0]

    def test_password(self):
        self.page.password = 'p\xe4ss:w\xf6rd'
        for word, status in (
                ('p\xe4ss:w\xf6rd', 200), ('p\xe4ss', 401), ('', 401), ('\xff', 401)):
            login = torque.binascii.b2a_base64(f'me:{word}'.encode()).decode().strip()
            self.gives(self.status, (f'Basic {login}', status))
        for text in ('Basic', 'Basic \xff', 'Basic !', 'Digest x', ''):
            for path in '/ /metrics /status.json /torque.js /no'.split():
                self.gives(self.status, (text, path, 401))


class WebCase(DaemonFolder):
    """A torque with its page, on a port of its own."""
    REQUEST = b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n'

    def web_ini(self, text='', port=0, **kwargs):
        self.ini(f'httpd.active = yes\nhttpd.port = {port}\n' + textwrap.dedent(text), **kwargs)

    def serve(self, text='', *words, **kwargs):
        self.web_ini(text, **kwargs)
        program = self.start(*words)
        self.find_port(program)
        return program

    def find_port(self, program):
        line = program.wait('the page is at')[-1]
        self.url = re.search(r'http://\S+', line)[0]
        self.port = int(re.search(r':(\d+)/', line)[1])

    def get(self, path='/', method='GET', **headers):
        """Return status, text and headers of an answer."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers

    def connect(self, content=b''):
        """Return a connection on which so much has been sent."""
        sock = socket.create_connection(('127.0.0.1', self.port), 30)
        self.addCleanup(sock.close)
        sock.sendall(content)
        return sock

    def read(self, sock):
        """Return all that comes until the server closes."""
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while not parts or parts[-1]:
                parts.append(sock.recv(65536))
        return b''.join(parts)


class WebTest(WebCase):
    def test_what_is_served(self):
        self.serve(self.job('bad', fail='<i>no luck</i>'), '-v')
        self.more(word='run', name='bad')
        wait_for(lambda: 'no luck' in self.get('/status.json')[1])
        for path, served in sides('''
                / >> text/html|&lt;i&gt;no luck&lt;/i&gt;
                /?x=1 >> text/html|<svg
                /torque.css >> text/css|prefers-color-scheme
                /torque.js >> text/javascript|fetch(
                /metrics >> text/plain; version=0.0.4|torque_job_failing{job="bad"} 1
                /status.json >> application/json|"jobs"'''):
            status, text, headers = self.get(path)
            kind, words = served.split('|')
            self.assertEqual((status, headers['Content-Type']), (200, f'{kind}; charset=utf-8'))
            self.assertIn(words, text)
            self.assertNotIn('<i>', text.replace('"<i>', ''))
            self.assertIn("default-src 'none'", headers['Content-Security-Policy'])
            self.assertEqual(headers['X-Content-Type-Options'], 'nosniff')
            self.assertEqual(int(headers['Content-Length']), len(text.encode()))
            status, text, head = self.get(path, 'HEAD')
            self.assertEqual((status, text, head['Content-Type']),
                             (200, '', headers['Content-Type']))
        self.assertEqual(self.get('/../etc/passwd')[0], 404)

    def test_nothing_comes_from_elsewhere(self):
        texts = torque.CSS + torque.JAVASCRIPT + torque.PAGE
        self.assertNotRegex(texts, r'//\w|url\(|@import|innerHTML|style=|<script>|\bon\w+=')

    def test_status_is_that_of_the_command(self):
        self.serve(tick='hour=3')
        answers = [json.loads(text) for text in (
            self.get('/status.json')[1], self.command('--status', '--json')[1])]
        for answer in answers:                  # what goes on meanwhile
            self.assertGreater(answer.pop('uptime'), 0)
            for engine in answer['rtorrent']:
                engine.pop('away_for')
        self.assertEqual(*answers)

    def test_only_get_and_head(self):
        self.serve()
        for method in 'POST PUT DELETE OPTIONS CONNECT TRACE X get'.split():
            status, text, headers = self.get('/', method)
            self.assertEqual(status, 501, method)
            self.assertNotIn('<', text)
        self.assertEqual(self.get(Host='evil.example')[0], 421)

    def test_other_addresses_need_a_password(self):
        for host in ('0.0.0.0', '::', 'localhost.example', ''):
            self.web_ini(f'httpd.host = {host}')
            text = self.says(78, f'torque.ini:|httpd.host|{host!r}|httpd.password')
            self.assertEqual(text.count('\n'), 1)

    def test_a_password_opens_it(self):
        self.serve('httpd.host = 0.0.0.0\nhttpd.password = sesame\n')
        status, text, headers = self.get()
        self.assertEqual((status, headers['WWW-Authenticate']), (401, 'Basic realm="torque"'))
        self.assertEqual(text.count('\n'), 1)
        login = torque.binascii.b2a_base64(b'anybody:sesame').decode().strip()
        self.assertEqual(self.get(Authorization=f'Basic {login}')[0], 200)
        self.assertNotIn('sesame', self.command('--check')[1])

    def test_what_is_no_request(self):
        program = self.serve()
        for start in b'GET / HTTP/1.1\r\nX: ', b'GET /':
            self.assertEqual(self.read(self.connect(start + b'x' * 9000)), b'')
        for content in (b'\r\n\r\n', b'\0\xff\r\n\r\n', b'GET\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n',
                        b'GET / HTTP/1.1\r\n\r\n', b'GET / HTTP/1.1\r\nHost\r\n\r\n',
                        b'\x16\x03\x01\x02\x00\r\n\r\n',
                        b'GET / HTTP/1.1\r\n' + b'X: y\r\n' * 500 + b'\r\n'):
            self.assertNotIn(b' 200 ', self.read(self.connect(content)), content[:40])
        self.assertEqual(self.get()[0], 200)
        self.assertFalse(program.seen('Traceback'), program.lines)

    def test_slow_and_mute_ones_hold_up_nothing(self):
        self.serve()
        mute = [self.connect() for _ in range(20)]
        slow = [self.connect(self.REQUEST[:-2]) for _ in range(20)]
        deaf = [self.connect(self.REQUEST) for _ in range(10)]
        self.more(count=4)
        self.assertEqual(self.get('/metrics')[0], 200)
        for sock in (*mute, *slow):             # each is closed in time
            self.assertEqual(self.read(sock), b'')
        for sock in deaf:
            self.assertIn(b'200 OK', self.read(sock))

    def test_two_hundred_at_once(self):
        program = self.serve()
        before = len(self.marks())
        for sock in [self.connect(self.REQUEST) for _ in range(200)]:
            self.assertIn(b' 200 OK', self.read(sock))
        self.more(count=4)
        self.assertLess(max_gap(self.marks()[before:]), 1.9)
        self.assertFalse(program.seen('Traceback'), program.lines)

    def test_port_is_taken(self):
        with socket.socket() as sock:
            sock.bind(('127.0.0.1', 0))
            sock.listen()
            port = sock.getsockname()[1]
            self.web_ini(port=port)
            program = self.start()
            self.more()
            line, = program.seen('WARNING page')
            self.assertIn(f'no page: 127.0.0.1 port {port}: ', line)
        self.web_ini(f'httpd.host = {"a" * 70}.b\nhttpd.password = x')
        self.assertTrue(self.start().seen('WARNING page', 'no page: aaa'))

    def test_history_over_reload_and_restart(self):
        program = self.serve()
        # The first point of the history is there.
        wait_for(lambda: re.search(r'd="M[\d.]+ [\d.]+h0"', self.get()[1]))
        self.assertEqual(program.stop(), 0)
        kept = json.loads(open_text(self.path('state/history.json')))
        kept['curves'] = dict.fromkeys(kept['curves'], [123] * 1440)
        self.write('state/history.json', json.dumps(kept))
        program = self.serve(port=free_port())
        self.assertRegex(self.get()[1], r'd="M0\.0 [\d.]+h0L')
        program.process.send_signal(signal.SIGHUP)
        program.wait('reloaded with')
        self.assertEqual(len(program.seen('the page is at', f':{self.port}/')), 2)
        self.assertRegex(self.get()[1], r'd="M0\.0 [\d.]+h0L')

    def test_stays_off(self):
        program = self.start()
        self.assertFalse(program.seen('page'))
        self.assertNotIn('_ssl', open_text(f'/proc/{program.process.pid}/maps'))


class DemoTest(Folder):
    def setUp(self):
        super().setUp()
        for name in ('home', 'tmp', 'program'):
            os.mkdir(self.path(name))
        shutil.copy(torque.__file__, self.path('program', 'torque.py'))
        self.before = self.paths()

    def paths(self):
        return sorted(os.path.join(parent, name)
                      for parent, folders, names in os.walk(self.folder)
                      for name in (*folders, *names))

    def demo(self, *words, home='home'):
        environ = {**os.environ, 'HOME': self.path(home), 'TMPDIR': self.path('tmp')}
        return self.ended(Program(
            [sys.executable, self.path('program', 'torque.py'), '--demo', *words],
            cwd=self.path('home'), env=environ))

    def fetch(self, program, path=''):
        line = program.wait('the page is at')[0]
        with urllib.request.urlopen(re.search(r'http://\S+/', line)[0] + path) as stream:
            return stream.read().decode()

    def shown(self, program, words):
        """Return the page once it holds all the words between bars."""
        def page():
            text = self.fetch(program)
            return all(word in text for word in words.split('|')) and text
        return wait_for(page)

    def test_writes_nothing_elsewhere(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            program = self.demo()
            self.shown(program, 'failing: fails_on_purpose')
            outside = [path for path in self.paths() if '/tmp/torque-demo-' not in path]
            self.assertEqual(outside, self.before)
            self.assertEqual(program.stop(number), 0)
            self.assertFalse(program.seen('Traceback'), program.lines)
            self.assertEqual(self.paths(), self.before)

    def test_needs_no_home(self):
        program = self.demo(home='nowhere/else')
        self.shown(program, 'failing: fails_on_purpose')
        self.assertEqual(program.stop(), 0)

    def test_there_is_something_to_look_at(self):
        program = self.demo('--daemon', '-D', 'httpd.port=0')
        page = self.shown(program, 'wikipedia-en-nopic.zim|waits for its turn|if it were no dry '
                                   'run|the limit is 1|of 2.0 MiB/s|free</b>|ended with status')
        self.assertNotIn('no figures yet', page)
        self.assertIn('rtorrent_download_bytes_per_second', self.fetch(program, 'metrics'))
        program.process.send_signal(signal.SIGHUP)
        program.wait('--demo has no files')
        self.assertTrue(self.fetch(program))

    def test_it_moves(self):
        engine = torque.StandIn('scgi:///demo')
        complete = []
        for seconds in (0, 100, 1000, 2000):
            with mock.patch('time.time', return_value=engine.began + seconds):
                everything, *parts = [torque.list_torrents(engine, view, ['up', 'down', 'done'])
                                      for view in ('main', 'complete', 'leeching')]
                self.assertEqual(len(everything), sum(map(len, parts)))
                complete.append(len(parts[0]))
                engine.tell([('d.start', f'{9:040X}')])
        self.assertGreater(max(complete), complete[0])


class GrafanaTest(Folder):
    def test_queries(self):
        for words, kind in sides('''
                >> influxdb
                influxdb >> influxdb
                prometheus >> prometheus'''):
            status, out, err = run_torque('--grafana', *words.split())
            self.assertEqual((status, err), (0, ''))
            board = json.loads(out)
            self.assertEqual(board['templating']['list'][0]['query'], kind)
            targets = [target for panel in board['panels'] for target in panel['targets']]
            self.assertEqual({'expr' in target for target in targets}, {kind == 'prometheus'})
        self.assertEqual(run_torque('--grafana', 'graphite')[0], 2)

    def test_names_are_those_that_are_sent(self):
        named = {f'rtorrent_{name}' for name in torque.METRICS.values()}
        named |= {'rtorrent_view_torrents', 'rtorrent_start_time_seconds',
                  'torque_disk_free_bytes'}
        sent = {'rtorrent_views': torque.VIEWS, 'rtorrent': torque.Stats._fields,
                'host': torque.disk_figures('/')}
        for panel in torque.dashboard('prometheus')['panels']:
            text = panel['targets'][0]['expr']
            pattern = re.search('"(rtorrent_.*?)"', text)
            if pattern:
                met = [name for name in named if re.fullmatch(pattern[1], name)]
                self.assertEqual(len(met), 2, text)
            else:
                self.assertIn(re.search(r'\b[a-z]+_\w+', text)[0], named)
        for panel in torque.dashboard('influxdb')['panels']:
            text = panel['targets'][0]['query']
            fields = {*re.findall(r'(?:mean|max)\((\w+)\)', text)}
            self.assertTrue(fields)
            self.assertLessEqual(fields, {*sent[re.search(r'FROM (\w+) ', text)[1]]})

    def test_schema(self):
        try:
            from grafana_foundation_sdk.cog.encoder import JSONEncoder
            from grafana_foundation_sdk.cog.plugins import register_default_plugins
            from grafana_foundation_sdk.models.dashboard import Dashboard
        except ImportError:
            self.skipTest('grafana-foundation-sdk is not installed')
        register_default_plugins()
        for kind in ('influxdb', 'prometheus'):
            board = torque.dashboard(kind)
            read = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
            self.assert_in(board, read, kind)

    def assert_in(self, ours, theirs, path):
        """Assert that nothing of ours was unknown to who has read it."""
        if isinstance(ours, dict):
            for key, value in ours.items():
                self.assertIn(key, theirs, path)
                self.assert_in(value, theirs[key], f'{path}.{key}')
        elif isinstance(ours, list):
            self.assertEqual(len(ours), len(theirs), path)
            for number, value in enumerate(ours):
                self.assert_in(value, theirs[number], f'{path}.{number}')
        else:
            self.assertEqual(ours, theirs, path)


class LivePageTest(WebCase):
    """A browser and a Prometheus, beside a torque beside a real rTorrent."""

    def setUp(self):
        super().setUp()
        self.rtorrent = self.ended(RTorrent(self.folder))

    def chromium(self, *words):
        """Return the words that start a browser which looks at the page."""
        need('chromium')
        return ['chromium', '--headless=new', '--no-sandbox', '--disable-gpu', '--dump-dom',
                f'--user-data-dir={self.folder}/browser', '--enable-logging=stderr',
                '--log-level=0', *words, self.url]

    def look(self, *words):
        """Return what a browser shows in the end, and assert that it does not complain."""
        done = subprocess.run(self.chromium(*words), stdout=subprocess.PIPE, timeout=60,
                              stderr=subprocess.PIPE, env={**os.environ, 'HOME': self.folder})
        self.assertNotIn(b'CONSOLE', done.stderr)
        return done.stdout.decode()

    def load_hostile(self):
        for name in SHOWN_NAMES:
            item = self.rtorrent.load(*metafile(name))
            self.rtorrent.engine.tell([('d.message.set', item, name)])
        return self.serve('''\
            job.queue.active = yes
            job.queue.schedule = every 1s
            job.queue.startable = *
            job.queue.downloading_max = 0
            job.rule.handler = torque:Action
            job.rule.schedule = every 1s
            job.rule.matcher = *
            job.rule.action = start
            job.rule.dry_run = yes
            job.rule.limit = 2
            ''', '--debug')

    def test_hostile_names_are_text(self):
        program = self.load_hostile()
        wait_for(lambda: 'dry run' in self.get()[1])
        before = len(program.seen('"GET / HTTP'))
        page = self.look('--virtual-time-budget=12000')
        self.assertIn('<title>torque</title>', page)
        self.assertIn('&lt;script&gt;document.title', page)
        self.assertNotRegex(page, '<img|<b>&|<script>')
        self.assertNotIn('\u202e', page)
        self.assertNotIn('W' * 1000, page)
        # It has renewed itself, and is whole afterwards.
        self.assertGreaterEqual(len(program.seen('"GET / HTTP')), before + 2)
        self.assertEqual(page.count('<main>'), 1)
        self.assertIn('Log</h2>', page)

    def test_without_javascript(self):
        program = self.serve('', '--debug')
        wait_for(lambda: 'answers' in self.get()[1])
        self.write('browser/Default/Preferences',
                   '{"profile":{"default_content_setting_values":{"javascript":2}}}')
        page = self.look('--timeout=1000')
        self.assertIn('Log</h2>', page)
        before = len(program.seen('"GET / HTTP'))
        self.ended(Program(self.chromium('--virtual-time-budget=60000'),
                           env={**os.environ, 'HOME': self.folder}))
        wait_for(lambda: len(program.seen('"GET / HTTP')) >= before + 3)
        self.assertFalse(program.seen('torque.js'))

    def test_metrics_are_as_prometheus_wants_them(self):
        need('promtool')
        need('prometheus')
        self.load_hostile()
        wait_for(lambda: re.search(r'\nrtorrent_up\{\S+ 1\n', self.get('/metrics')[1]))
        text = self.get('/metrics')[1]
        checked = subprocess.run(['promtool', 'check', 'metrics'], input=text.encode(),
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        self.assertEqual((checked.returncode, checked.stdout.decode()), (0, ''))
        self.assertNotRegex(text, 'script|WWWW|[0-9A-F]{40}')
        listed = self.rtorrent.engine.ask([('system.listMethods',)])[0]
        told = {'startup_time': 'start_time_seconds', **torque.METRICS}
        for command in EXPORTED:
            if command in listed:
                self.assertIn(f'\nrtorrent_{told[command]}{{', text)
        for words in ('rtorrent_info{', 'client="', 'view="main"} 8', 'rtorrent_tracker_torrents{',
                      'rtorrent_tracker_message_torrents{'):
            self.assertIn(words, text)
        self.assert_scraped(text)

    def assert_scraped(self, text):
        """Let a real Prometheus scrape the page, and ask it for the figures."""
        port = free_port()
        path = self.write('prometheus.yml', f'''\
            scrape_configs:
              - job_name: torque
                scrape_interval: 1s
                static_configs:
                  - targets: ['127.0.0.1:{self.port}']
            ''')
        self.ended(Program(['prometheus', f'--config.file={path}',
                            f'--storage.tsdb.path={self.folder}/prometheus',
                            f'--web.listen-address=127.0.0.1:{port}']))

        def value(query):
            query = urllib.parse.quote(query)
            with contextlib.suppress(OSError, IndexError):
                with urllib.request.urlopen(
                        f'http://127.0.0.1:{port}/api/v1/query?query={query}') as stream:
                    return json.load(stream)['data']['result'][0]['value'][1]
        wait_for(value, 'rtorrent_view_torrents{view="main"}')
        self.gives(value, ('rtorrent_view_torrents{view="main"}', '8'), ('up', '1'),
                   ('rtorrent_up', '1'), ('rtorrent_tracker_torrents', '8'))
        for panel in torque.dashboard('prometheus')['panels']:
            for target in panel['targets']:
                self.assertTrue(value(target['expr']), target)


# --- Command line --------------------------------------------------------------------------------

class CommandLineTest(ConfigCase):
    def test_every_answer_helps(self):
        self.ini(GOOD_INI)
        options = [*torque.CORE_OPTIONS, *torque.TORQUE_OPTIONS, *(
            option for job in BUILT_IN.values() for option in job.options)]
        helps = '|'.join([*BUILT_IN] + [
            str(text) for option in options for text in (option[0], *option[2:])])
        for words, told in sides('''
                --version >> 0 torque
                --help >> 0 --run-once JOB|78 config
                --list-jobs >> 0 HELPS
                -x >> 2 usage: |-x
                --stop --status >> 2 --status: not allowed with argument --stop
                --demo --check >> 2 not allowed
                t.ini >> 2 t.ini
                -D >> 2 -D
                -c t.ini --run-once b >> 2 no job 'b'| a| connstats
                -c none.ini >> 78 none.ini: No such file
                -c . >> 78 .: is no
                -c t.ini --log-file /nowhere/x >> 78 /nowhere/x: No such file
                -c t.ini -D grace=x >> 78 grace: 'x\''''):
            expected, texts = told.replace('HELPS', helps).split(' ', 1)
            with self.subTest(words=words):
                status, *streams = self.command(*words.split())
                right, wrong = streams[status != 0], streams[status == 0]
                self.assertEqual((str(status), wrong), (expected, ''))
                for text in texts.split('|'):
                    self.assertIn(text, right)

    def test_usual_places_are_searched(self):
        os.environ['XDG_CONFIG_HOME'] = self.path('xdg')
        places = ['.pyroscope/torque.ini', 'xdg/torque/torque.ini', 'torque.ini']
        status, out, err = self.command('--check')
        self.assertEqual((status, out), (78, ''))
        for word in (f'INFO config: there is no torque.ini or {self.path("xdg")}/torque/torque.ini',
                     '/.pyroscope/torque.ini: the defaults are run; torque.ini.example',
                     '<defaults>: scgi_url: is not set in [TORQUE], and there is no', '.rc'):
            self.assertIn(word, err)
        for place in places:
            self.write(place, HEAD)
            self.assertRegex(self.command('--check')[1], rf'(?m)^(\S+/)?{place}: no mistakes')

    def test_check_counts_warnings(self):
        self.ended(Server(Commands().scgi, self.path('rpc.sock')))
        away = '-D scgi_url=/no.sock'
        for text, words, told in (
                ('', '', ''), ('downloading_max = 1\nx = 1\n', '', '; warnings: 2'),
                ('', away, '; warnings: 1; rTorrent is away'),
                ('y = 1\n', f'-q {away}', '; warnings: 2; rTorrent is away'),
                ('job.treewatch.active=yes\njob.treewatch.path = /tmp', '', '; warnings: 1')):
            path = self.ini(f'[TORQUE]\nscgi_url = {self.folder}/rpc.sock\n{text}')
            with self.subTest(text=text, words=words):
                status, out, _ = self.command('-c', path, '--check', *words.split())
                self.assertEqual((status, out.splitlines()[-1]), (0, f'{path}: no mistakes{told}'))

    def test_defaults_are_run_without_an_ini(self):
        self.ended(Server(Commands().scgi, self.path('rpc.sock')))
        self.write('.rtorrent.rc', 'scgi_local = (cat,(fs.homedir),/rpc.sock)')
        status, out, err = self.command('--check')
        self.assertEqual((status, 'the defaults are run' in err), (0, True), err)
        for text in ('connstats  torque:Engine', f'{self.path("rpc.sock")}: rTorrent',
                     '<defaults>: no mistakes'):
            self.assertIn(text, out)
        status, out, err = self.command('--run-once', 'connstats', '-D', 'rpc_timeout=2')
        self.assertEqual((status, 'INFO connstats: double:1' in err), (0, True), err)
        self.assertEqual(self.command('--status'),
                         (69, 'torque is not running with <defaults>: '
                              f'{self.path(".local/state/torque/default/torque.pid")} '
                              'is not locked\n', ''))
        self.assertEqual(self.command('--daemon')[0], 0)
        self.addCleanup(self.command, '--stop')
        self.assertEqual(os.listdir(self.path('.local/state/torque')), ['default'])
        other = self.path('other')
        os.mkdir(other)
        status, out, err = run_torque('--status', '-q', cwd=other)
        self.assertEqual((status, 'connstats' in out, err), (0, True, ''))
        self.assertEqual(run_torque('--stop', cwd=other)[0], 0)
        self.assertEqual(self.command('--status')[0], 69)

    def test_check_shows_next_runs(self):
        before, zone = time.time(), time.strftime('%Z')
        status, out, err, _ = self.check(GOOD_INI + 'job.b.handler = good:Plain\n'
                                         'job.b.schedule = hour=3\n')
        self.assertEqual(status, 0)
        self.assertRegex(err, rf'^{TIME} WARNING engine: .*/nowhere: .*\n$')
        self.assertRegex(out, '^JOB +HANDLER +SCHEDULE +NEXT')
        by_hour = parse_schedule('hour=3').next
        for row, first, following in (('a +good:Plain +1h', before, lambda due: due + 3600),
                                      ('b +good:Plain +hour=3', by_hour(before), by_hour)):
            told = re.search(rf'(?m)^{row} +({TIME}), ({TIME}), ({TIME}) {zone}$', out)
            due = [time.mktime(time.strptime(text, '%Y-%m-%d %H:%M:%S')) for text in told.groups()]
            self.assertAlmostEqual(due[0], first, delta=20)
            self.assertEqual(due[1:], [following(due[0]), following(due[1])])

    @unittest.skipIf(NO_ZONES, NO_ZONES)
    def test_time_zones_are_told(self):
        path = self.ini(f'{HEAD}job.a.handler = good:Plain\njob.b.handler = good:Plain\n'
                        'job.a.schedule = hour=4 timezone=Asia/Tokyo\njob.b.schedule = hour=3\n')
        now = datetime.datetime.now(zoneinfo.ZoneInfo('Asia/Tokyo'))
        day = now.date() + datetime.timedelta(now.hour >= 4)
        for zone, told in sides('''
                Europe/Berlin >> CES?T
                :Europe/London >> GMT|BST
                UTC >> UTC
                >> UTC
                CET-1CEST >> CES?T
                Etc/GMT >> GMT
                Europe/Berln >> Europe, warned of
                Berlin >> Berlin, warned of
                :/etc/nosuch >> , warned of'''):
            shown, warned, _ = told.partition(', warned of')
            with self.subTest(zone=zone), mock.patch.dict(os.environ, TZ=zone):
                status, out, err = self.command('-c', path, '--check')
                self.assertRegex(out, rf'(?m)^b .* 03:00:00 ?({shown})$')
                self.assertRegex(out, rf'(?m)^a .* {day} 04:00:00, .* 04:00:00 Asia/Tokyo$')
                text = f"TZ='{zone.strip(':')}' is no time zone of this machine: times are UTC"
                self.assertEqual((status, err.count(text)), (0, bool(warned)))

    def test_run_once_tells_how_it_went(self):
        self.ini(DOES + '\njob.a.active = no\njob.b.handler = good:Plain\njob.b.schedule = 1h\n')
        for code, expected, text in (
                ('pass', 0, ''), ('raise torque.LoggableError("no luck")', 1, 'WARNING a: no luck'),
                ('raise ValueError("odd")', 1, 'ERROR a: ValueError: odd'),
                ('sys.exit(0)', 1, 'ERROR a: SystemExit: 0'),
                ('self.engine.reach()', 1, 'WARNING engine: scgi:///nowhere: there is no such')):
            with self.subTest(code=code):
                status, out, err = run_torque(*RUN, '-D', f'job.a.code={code}', cwd=self.folder)
                self.assertEqual((status, out), (expected, ''))
                self.assertIn(text, err)
                self.assertEqual('Traceback' in err, 'ERROR a: ' in text)
                self.assertEqual((err.count('INFO a: cleaned'), err.count(' b: ')), (1, 0))
                self.assertLess(err.count('/nowhere'), 2)

    def test_log_shows_what_is_asked(self):
        self.ini(GOOD_INI + 'job.a.password = hunter2\njob.a.url = http://me:hunter2@h/\n')
        every = 'DEBUG INFO WARNING INFO'
        for words, levels in (
                ([], every[6:]), (['-v'], every), (['--debug'], every), (['-q'], 'WARNING'),
                (['-D', 'job.a.log_level=debug'], every), (['-D', 'job.a.log_level=ERROR'], '')):
            with self.subTest(words=words):
                status, _, err = self.command(*RUN, *words)
                self.assertEqual((status, re.findall('([A-Z]+) a: ', err)), (0, levels.split()))
                self.assertNotIn('hunter2', err)
        self.assertRegex(self.command(*RUN, '-n')[2], rf"^{TIME} INFO a: ran .*'dry_run': True")

    def test_what_modules_and_libraries_log(self):
        self.write('mine/__init__.py', '')
        self.write('mine/jobs.py', '''\
            import logging, torque
            class Job:
                def __init__(self, config):
                    pass
                def run(self):
                    logging.basicConfig(format='not asked for: %(message)s')
                    for name in __name__, 'mine.other', 'library.part', None:
                        for level in 10, 20, 30:
                            logging.getLogger(name).log(level, 'a\\nb')
            ''')
        self.ini(GOOD_INI.replace('good:Plain', 'mine.jobs:Job'))
        log = self.path('log')
        for words, levels in sides(f'''
                >> INFO WARNING
                -q >> WARNING
                -v >> DEBUG INFO WARNING
                --debug >> DEBUG INFO WARNING
                --log-file {log} >> INFO WARNING'''):
            with self.subTest(words=words):
                status, _, err = self.command(*RUN, *words.split())
                self.assertEqual(status, 0)
                if 'log-file' in words:
                    self.assertEqual(err, '')
                    err = open_text(log)
                self.assertEqual([line[20:] for line in err.splitlines()], [
                    f'{level} {name}: a\\x0ab'
                    for name in ('mine.jobs', 'mine.other', 'library.part', 'root')
                    for level in levels.split()])

    def test_journal_adds_the_time_itself(self):
        self.ini(GOOD_INI)
        for journal, pattern in ('{0.st_dev}:{0.st_ino}', 'INFO a: '), ('8:1', f'{TIME} INFO a: '):
            with self.subTest(journal=journal), open(self.write('err', ''), 'r+') as stream:
                journal = journal.format(os.fstat(stream.fileno()))         # of stderr, or another
                with mock.patch.dict(os.environ, JOURNAL_STREAM=journal):
                    subprocess.check_call([sys.executable, torque.__file__, *RUN], cwd=self.folder,
                                          stderr=stream)
                stream.seek(0)
                self.assertRegex(stream.read(), f'^{pattern}ran ')

    def test_hostile_text_is_escaped(self):
        text = r'a\x0ab\x1b[2J\x07c\x85d\u2028e\udce9f'
        self.ini(f"{DOES}self.LOG.info('{text}')\n")
        log = self.path('log')
        told = self.command(*RUN)[2]
        self.assertEqual(self.command(*RUN, '--log-file', log), (0, '', ''))
        for line in told, open_text(log):
            self.assertRegex(line, rf'^{TIME} INFO a: {re.escape(text)}\n')

    def test_text_of_errors_is_no_record(self):
        record = '2020-02-02 02:02:02 INFO main: stopped'
        self.ini(f'{DOES}raise ValueError("a\\n{record}\\rb")\n')
        told = run_torque(*RUN, cwd=self.folder)[2].splitlines()
        self.assertIn(f'    {record}\\x0db', told)
        records = [line for line in told if not line.startswith('    ')]
        self.assertEqual([line.split()[2:4] for line in records],
                         [['ERROR', 'a:'], ['INFO', 'a:']])

    def test_rtorrent_is_asked(self):
        daemon = self.ended(RTorrent(self.folder))
        text = f'{DOES}self.LOG.info(config_ini.engine.open().session.name())\n' \
            'job.queue.active = yes\njob.queue.viewname = strated\n' \
            'job.m.handler = torque:Move\njob.m.schedule = 1h\njob.m.matcher = *\n' \
            'job.m.target = /x\n'
        self.ini(text.replace('/nowhere', daemon.url))
        self.assertRegex(self.command(*RUN)[2], rf'^{TIME} INFO a: \S+:{daemon.process.pid}\n')
        status, out, err = self.command('-c', 't.ini', '--check')
        self.assertRegex(out, rf'(?m)^scgi://{re.escape(daemon.url)}: rTorrent [\d./]+ answers$')
        self.assertRegex(err, f"^{TIME} WARNING queue: rTorrent has no view 'strated'; did you "
                              r"mean 'started'\?\n$")
        self.assertEqual(status, 0)


# --- Patterns ------------------------------------------------------------------------------------

RE_METHODS = 'match fullmatch search sub findall finditer split'.split()
PARSER = getattr(re, '_parser', None) or importlib.import_module('sre_parse')
COMPILER = getattr(re, '_compiler', None) or importlib.import_module('sre_compile')
SAMPLES = [*'a0 x/.-=,;:"\'\\()[]{}\n_AZ!~+<>#%&|@*?^$\r\t\x01\xe9', *map(chr, range(300))]
# Patterns that see no longer text than this; and functions that compile what a user wrote.
CUT = {'TV': 255, 'MOVIE': 255, 'CLASS_OR_ESCAPE': 500, 'REPEATED_REPEAT': 500, 'STARS': 500}
OF_USERS = ('text_pattern',)


def sample_of(tree, branch=0):
    """Return a short text that a parsed pattern matches, nearly."""
    text = ''
    for at, (kind, value) in enumerate(tree):
        kind = str(kind)
        if 'REPEAT' in kind:
            text += sample_of(value[2], branch) * max(1, min(value[0], 20))
        elif kind == 'SUBPATTERN':
            text += sample_of(value[-1], branch)
        elif kind == 'BRANCH':
            text += sample_of(value[1][branch % len(value[1])], branch)
        elif kind in 'IN ANY LITERAL NOT_LITERAL'.split():
            text += next(filter(COMPILER.compile(tree[at:at + 1]).fullmatch, SAMPLES))
    return text


def repeats_in(tree, before=''):
    """Give (what leads there, tree) of each part that is repeated."""
    for at, (kind, value) in enumerate(tree):
        kind, inside = str(kind), []
        if 'REPEAT' in kind:
            yield before, value[2]
            inside = [value[2]]
        elif kind == 'BRANCH':
            inside = value[1]
        elif kind in ('SUBPATTERN', 'ASSERT', 'ASSERT_NOT'):
            inside = [value[-1]]
        for part in inside:
            yield from repeats_in(part, before)
        before += sample_of(tree[at:at + 1])


def dislikes(regex):
    """Return texts of a beginning and a part that is repeated, which a pattern may be slow on."""
    source = regex.pattern
    if isinstance(source, bytes):
        source = source.decode('latin-1')
    tree = PARSER.parse(source, regex.flags & ~re.U)
    whole = sample_of(tree)
    units = {('', unit) for unit in {*source, *'a0 \n."\\/', whole, whole[:2], whole[:3]} if unit}
    for before, part in repeats_in(tree):
        for branch in range(3):
            unit = sample_of(part, branch)
            if unit:
                units |= {('', unit), (before, unit), ('', before + unit)}
    return units


def of_torque(node):
    """Return what an expression of torque.py comes to; a pattern is made of constants."""
    return eval(compile(ast.Expression(node), 'torque.py', 'eval'), vars(torque))


def patterns_of_torque():
    """Give (name or line, compiled, method) of every regular expression in torque.py."""
    tree = ast.parse(open_text(torque.__file__))
    used = collections.defaultdict(set, SECTCRE={'match'})          # by configparser itself
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node
        if isinstance(node, ast.Attribute) and node.attr in RE_METHODS:
            used[getattr(node.value, 'id', '')].add(node.attr)
    for node in ast.walk(tree):
        word = getattr(node, 'func', None)
        if getattr(getattr(word, 'value', None), 'id', '') != 're' or word.attr == 'escape':
            continue
        place = node
        while not isinstance(place, (ast.FunctionDef, ast.Module)):
            place = place.parent
        if getattr(place, 'name', '') in OF_USERS:
            continue
        method = word.attr
        flags = node.args[{'compile': 1, 'sub': 4, 'split': 3}.get(method, 2):]
        flags += [option.value for option in node.keywords if option.arg == 'flags']
        regex = re.compile(of_torque(node.args[0]), *map(of_torque, flags[-1:]))
        target = node.parent.targets[0].id if isinstance(node.parent, ast.Assign) else ''
        if method != 'compile':
            yield f'line {node.lineno}', regex, method
            continue
        for method in target and used[target] or ('match', 'fullmatch', 'search'):
            yield target or f'line {node.lineno}', regex, method


class PatternsTest(unittest.TestCase):
    """Every pattern in torque.py takes time in proportion to the text."""

    def setUp(self):
        self.addCleanup(signal.signal, signal.SIGPROF, signal.signal(signal.SIGPROF, self.stop))

    def stop(self, *args):
        raise AssertionError('half a second of CPU time is over')

    def seconds(self, regex, method, text):
        """Return the CPU time of one use of a pattern, which is stopped in time."""
        if isinstance(regex.pattern, bytes):
            text = text.encode('latin-1', 'replace')
        words = [text[:0]] * (method == 'sub') + [text]
        signal.setitimer(signal.ITIMER_PROF, .5)
        try:
            began = time.process_time()
            result = getattr(regex, method)(*words)
            if method == 'finditer':
                collections.deque(result, 0)
            return time.process_time() - began
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def check(self, regex, method, size):
        """Feed little to find what it dislikes most, then as much as there may be of that."""
        def text(size, before, unit, end):
            return before + unit * (size // len(unit)) + end
        little = max(size // 20, 120)           # a cut one says nothing in 12 characters
        slowest = max((self.seconds(regex, method, text(little, *unit, end)), *unit, end)
                      for unit in dislikes(regex) for end in ('\x01', '\n', '\n\x01'))
        whole = text(size, *slowest[1:])
        if self.seconds(regex, method, whole) > .03:
            half = text(size // 2, *slowest[1:])
            self.assertLess(min(self.seconds(regex, method, whole) for _ in range(3)),
                            3 * min(self.seconds(regex, method, half) for _ in range(3)) + .05,
                            slowest)

    def test_time_grows_with_the_text(self):
        number = 0
        for name, regex, method in patterns_of_torque():
            number += 1
            with self.subTest(name, method=method, pattern=regex.pattern):
                self.check(regex, method, CUT.get(name, 100000))
        self.assertGreater(number, 60)

    def test_quadratic_patterns_are_caught(self):
        for pattern, method in (('a*a*b', 'match'), (r'\s*=', 'search'), ('(a|aa)+$', 'match'),
                                ('<[^>]*>', 'findall'), (r'x(\w+):', 'sub')):
            with self.subTest(pattern), self.assertRaises(AssertionError):
                self.check(re.compile(pattern), method, 100000)


# --- Measurements --------------------------------------------------------------------------------
# Printed by `test_torque.py bench` and `test_torque.py soak MINUTES`; nothing passes or fails.

REPLY_ROW = ['A' * 40, 'Some name of a torrent 2026', 734003200, 734003200, 1520, 20480, 0,
             2 ** 33, 1, 1, 1, 'label', '/srv/data/Some name of a torrent 2026', 1700000000, '']
# Meets one torrent in twenty of fill_session().
RULE = 'is_complete=yes ratio>2'
BENCH_FIELDS = ('name size done ratio up down uploaded is_active is_complete is_open label '
                'directory loaded message prio').split()


def fastest(function, times=7, clock=time.perf_counter):
    """Return the least milliseconds that a call takes."""
    took = []
    for _ in range(times):
        began = clock()
        function()
        took.append(clock() - began)
    return min(took) * 1000


def per_second(step, seconds=0.3):
    """Return how often step() can be called in a second; it gets the last result."""
    count, value, began = 0, None, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(50):
            value = step(value)
        count += 50
    return count / (time.perf_counter() - began)


def spread(seconds):
    """Return what times were like."""
    times = [1000 * second for second in sorted(seconds)]
    return (f'p50 {times[len(times) // 2]:.2f} ms, p99 {times[len(times) * 99 // 100]:.2f} ms, '
            f'max {times[-1]:.2f} ms ({len(times)} times)')


def import_peer():
    """Return pyrosimple's modules, None where it is not installed or does not work."""
    try:
        import pyrosimple.job.action
        import pyrosimple.job.watch
        return pyrosimple
    except Exception as error:                  # whatever is wrong with it, ours is measured
        print(f'pyrosimple: {type(error).__name__}: {error}')
        return None


def fill_session(folder, count, files, step):
    """Write the session of torrents; return those with data and a ratio of 3, one of `step`."""
    session, seeding = os.path.join(folder, 'session'), []
    os.mkdir(session)
    for number in range(count):
        content, info_hash = metafile(f'item {number}', files)
        put_data(session, info_hash + '.torrent', content)
        if number % step == 0:
            put_data(os.path.join(folder, 'data'), f'item {number}', files)
            put_data(session, info_hash + '.torrent.rtorrent', bencode({'total_uploaded': 3}))
            seeding.append(info_hash)
    return seeding


@contextlib.contextmanager
def bench_rtorrent(count=0, files=1, step=20):
    """Start an rTorrent with torrents; give it and those of them that have data."""
    with tempfile.TemporaryDirectory() as folder:
        seeding = fill_session(folder, count, files, step)
        server = RTorrent(folder)
        ask = server.engine.ask
        try:
            wait_for(lambda: ask([('view.size', '', 'main')]) == [count], seconds=120)
            server.engine.tell(('d.check_hash', item) for item in seeding)
            wait_for(lambda: all(ask(('d.complete', item) for item in seeding)), seconds=120)
            yield server, seeding
        finally:
            server.end()


def bench_decode():
    for count in (1000, 10000):
        reply = [REPLY_ROW] * count
        content = xml_answer(reply, '\r\n', 'i8')
        text = json.dumps({'jsonrpc': '2.0', 'id': 0, 'result': reply}).encode()
        assert xml_reply(content) == reply
        loads = fastest(lambda: xmlrpc.client.loads(content))
        ours = fastest(lambda: xml_reply(content))
        by_json = fastest(lambda: json.loads(torque.json_text(text, 1 << 30)))
        print(f'decode {count:6} rows: xmlrpc.client {loads:6.1f} ms, torque XML {ours:6.1f} ms '
              f'({loads / ours:.1f} x), JSON {by_json:5.1f} ms ({loads / by_json:.1f} x)')


def bench_schedules():
    start = 1700000000
    now = datetime.datetime.fromtimestamp(start, datetime.timezone.utc)
    for text in ('second=*/15', 'minute=*', 'hour=3', '*/5 * * * *', '0 4 * * mon', '@monthly',
                 'hour=12 "day=3rd sun"', 'month=2 day=29', 'week=53 hour=12',
                 'hour=3 timezone=Europe/Berlin'):
        schedule = parse_schedule(text)
        rate = per_second(lambda after: schedule.next(after or start) or start)
        line = f'next runs a second, {text:31} torque {rate:9,.0f}'
        if CronTrigger and '=' in text:
            fields = dict(word.split('=') for word in shlex.split(text))
            trigger = CronTrigger(**{'timezone': 'UTC', **fields})
            rate = per_second(lambda last: trigger.get_next_fire_time(last, last or now))
            line += f', APScheduler {rate:8,.0f}'
        if croniter and '=' not in text:
            cron = croniter.croniter(text, start)
            line += f', croniter {per_second(lambda last: cron.get_next(float)):8,.0f}'
        print(line)


def bench_lateness(seconds=8):
    for count in (1, 100, 1000):
        scheduler, late = Scheduler(), []
        schedule = parse_schedule('every 1s')    # all are due at the same moment

        def run():
            late.append((torque.elapsed_time() - schedule.start) % schedule.seconds)
        for number in range(count):
            scheduler.add(Task(f'job{number}', schedule, run))
        threading.Timer(seconds, scheduler.calls.put, [scheduler.stop]).start()
        scheduler.serve(lambda: None)
        print(f'lateness of {count:4} jobs a second: {spread(late[2 * count:])}')   # without start


def spent_by(words):
    """Run a command; return its seconds of wall time and of CPU time."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, words
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def spent_so_far(program):
    """Return the context switches and the milliseconds of CPU time of all threads."""
    switches, ran, tasks = 0, 0, f'/proc/{program.process.pid}/task'
    for task in os.listdir(tasks):
        found = re.findall(r'ctxt_switches:\s+(\d+)', open_text(f'{tasks}/{task}/status'))
        switches += sum(map(int, found))
        ran += int(open_text(f'{tasks}/{task}/schedstat').split()[0])
    return switches, ran / 1e6


def bench_double():
    """Return a double of rTorrent that answers what EngineStats asks."""
    return Server(Commands(**dict.fromkeys(torque.GAUGES.values(), 0)).scgi)


def bench_process():
    server = bench_double()
    with tempfile.TemporaryDirectory() as folder:
        path = write_ini(folder, server.url, 'job.connstats.schedule = every 1m\n')
        for name, *words in (('bare interpreter', '-c', 'pass'),
                             ('--help', torque.__file__, '--help'),
                             ('one job once', torque.__file__, '-c', path, '--run-once',
                              'connstats')):
            wall, cpu = zip(*(spent_by([sys.executable, *words]) for _ in range(10)))
            print(f'{name}: {min(wall):.3f} s wall, {min(cpu):.3f} s CPU (best of 10)')
        daemon = start_torque('-c', path)
        daemon.wait('connstats', 'rpc')
        switches, ran = spent_so_far(daemon)
        time.sleep(60)
        after, ran_after = spent_so_far(daemon)
        print(f'one job a minute: {after - switches} context switches and {ran_after - ran:.2f} '
              f'ms CPU a minute, {memory_of(daemon) / (1 << 20):.1f} MiB resident')
        daemon.stop()
    server.end()


def bench_page():
    """Compare the memory of a torque with the page, when it has been looked at, to one without."""
    server = bench_double()
    resident = []
    for text in ('', 'httpd.active = yes\nhttpd.port = 0\n'):
        with tempfile.TemporaryDirectory() as folder:
            daemon = start_torque('-c', write_ini(folder, server.url, text))
            daemon.wait('connstats', 'rpc')
            for line in daemon.seen('the page is at'):
                url = re.search(r'http://\S+', line)[0]
                for name in ('', 'metrics', 'status.json') * 100:
                    with urllib.request.urlopen(url + name) as stream:
                        stream.read()
                took = fastest(lambda: urllib.request.urlopen(url).read())
            resident.append(memory_of(daemon) / (1 << 20))
            daemon.stop()
    server.end()
    print(f'memory: {resident[0]:.1f} MiB, with the page {resident[1]:.1f} MiB '
          f'({resident[1] - resident[0]:+.1f}); the page takes {took:.1f} ms')


def peer_rule(peer, url):
    """Return a run of pyrosimple's job for the rule of bench_torrents."""
    return peer.job.action.Action({'scgi_url': f'scgi+unix://{url}', 'matcher': RULE,
                                   'view': 'main', 'action': 'stop', 'dry_run': True}).run


def peer_list(peer, url):
    """Return what lists the values of the fields by pyrosimple."""
    registry = peer.torrent.engine.FIELD_REGISTRY
    prefetch = {command for field in BENCH_FIELDS for command in registry[field].requires}
    engine = peer.connect(f'scgi+unix://{url}')
    return lambda: [[getattr(item, field) for field in BENCH_FIELDS]
                    for item in engine.items('main', prefetch)]


def bench_torrents():
    """Time rules and lists on a real rTorrent that is filled for it."""
    condition, peer = parse_condition(RULE), import_peer()
    for count in (100, 1000, 5000):
        with bench_rtorrent(count) as (server, seeding):
            engine = server.engine
            run_rule = [lambda: list_torrents(engine, 'main', (), condition)]
            run_list = [lambda: list_torrents(engine, 'main', BENCH_FIELDS)]
            assert len(run_rule[0]()) == len(seeding)
            if peer:
                run_rule.append(peer_rule(peer, server.url))
                run_list.append(peer_list(peer, server.url))
            for run in run_list:
                assert len(run()) == count
            rules = ', '.join(f'{fastest(run, clock=time.process_time):.2f}' for run in run_rule)
            lists = ', '.join(f'{fastest(run):.1f}' for run in run_list)
            cells = {need.rstrip('=') + '=' for name in BENCH_FIELDS
                     for need in TORRENT_FIELDS[name].needs if need.startswith('d.')}
            question = xml_batch([('d.multicall2', '', 'main', *cells)])
            answer = fastest(lambda: engine.send(question, 'text/xml'))
            print(f'{count:5} torrents, torque and its peer: the rule `{RULE}` {rules} ms CPU; '
                  f'a list of 15 fields {lists} ms, of which rTorrent {answer:.1f}')
    row = {'is_complete': True, 'ratio': 3.0}
    print(f'conditions: {2 * per_second(lambda last: condition.match(row, 0)):,.0f} a second')


def torque_watch(url, watch):
    """Start torque with a TreeWatch; return what ends it."""
    program = start_torque('-c', write_ini(os.path.dirname(watch), url, f'''
        job.treewatch.active = yes
        job.treewatch.path = {watch}'''))
    program.wait('started with')
    return program.stop


def bench_watch():
    """Time how soon a metafile that is moved into a watch folder is in a real rTorrent."""
    peer = import_peer()

    def peer_watch(url, watch):
        job = peer.job.watch.TreeWatch({'scgi_url': f'scgi+unix://{url}', 'path': watch})
        return job.run                          # its thread ends with the process
    for start in (torque_watch, peer_watch)[:1 + bool(peer)]:
        with bench_rtorrent() as (server, _):
            watch = os.path.join(server.folder, 'watch')
            os.mkdir(watch)
            stop = start(server.url, watch)
            print(f'{start.__name__}: {time_watch(server, watch)}')
            stop()


def time_watch(server, watch):
    """Return how long it takes from rename() until rTorrent has an item: one and 500 at once."""
    proxy = server.engine.open()

    def drop(name):
        content, info_hash = metafile(name)
        put_data(server.folder, 'new', content)
        os.rename(os.path.join(server.folder, 'new'), os.path.join(watch, f'{name}.torrent'))
        return info_hash
    late = []
    for number in range(101):
        began = time.perf_counter()
        info_hash = drop(f'one {number}')
        while info_hash not in proxy.download_list(''):
            time.sleep(0.0002)                  # of two CPUs one is rTorrent's, one the watch's
        late.append(time.perf_counter() - began)
        time.sleep(0.1)                         # the next one meets an idle watch again
    began = time.perf_counter()
    for number in range(500):
        drop(f'many {number}')
    wait_for(lambda: proxy.view.size('', 'main') == 601, seconds=120)
    # The first meets a watch that is still starting.
    return f'{spread(late[1:])}, 500 at once {time.perf_counter() - began:.2f} s'


def bench_cull(count=5000):
    """Time how long a cull of one item takes beside others that all have data."""
    with bench_rtorrent(count + 1, {'x': 1, 'sub/y': 1}, 1) as (server, items):
        took = []
        for matcher in (NONE, items[0]):
            path = write_ini(server.folder, server.url, f'''
                job.t.handler = torque:Action
                job.t.schedule = 1h
                job.t.action = cull
                job.t.matcher = hash={matcher}''')
            began = time.perf_counter()
            status, _, log = run_torque('-c', path, '--run-once', 't')
            took.append(time.perf_counter() - began)
            assert status == 0, log
        assert server.engine.ask([('view.size', '', 'main')]) == [count]
        print(f'cull of one item beside {count:,}: {took[1] - took[0]:.2f} s')


def bench_killed(tries=50):
    """Kill culls and Moves at random moments, more often than the tests do."""
    for name in ('test_cull_is_killed', 'test_move_is_killed'):
        test, result = LiveHalvesTest(name), unittest.TestResult()
        test.tries = tries
        test.run(result)
        for _, text in result.failures + result.errors + result.skipped:
            print(text)
        print(f'{name}, {tries} times: no failures: {result.wasSuccessful()}')


def soak(minutes=30):
    """Run 200 jobs a second for a while, and print how much memory that takes."""
    with tempfile.TemporaryDirectory() as folder:
        put_data(folder, 'nothing.py', b'class Job:\n    def __init__(self, config):\n'
                 b'        pass\n    def run(self):\n        pass\n')
        jobs = [f'job.j{number}.handler = nothing:Job\njob.j{number}.schedule = every 0.1s\n'
                for number in range(20)]
        daemon = start_torque('-q', '-c', write_ini(folder, folder + '/none', ''.join(jobs)))
        ask = PidFile(os.path.join(folder, 'state/torque.pid')).ask
        wait_for(os.path.exists, os.path.join(folder, 'state/torque.pid.sock'))
        time.sleep(5)
        for minute in range(int(minutes) + 1):
            runs = sum(job['runs'] for job in ask(20)['jobs'])
            print(f'{minute:3} min: {runs:7} runs, {memory_of(daemon) / (1 << 20):.1f} MiB '
                  'resident', flush=True)
            time.sleep(60)
        daemon.stop()


def bench():
    """Print all measurements; nothing here passes or fails."""
    print(f'torque {torque.VERSION}, Python {sys.version.split()[0]}, {os.cpu_count()} CPUs')
    bench_process()
    bench_page()
    bench_lateness()
    bench_schedules()
    bench_decode()
    bench_torrents()
    bench_watch()
    bench_cull()
    bench_killed()


# --- The test program ----------------------------------------------------------------------------

def setUpModule():
    """Let the tests neither read nor leave anything in the user's HOME."""
    home = tempfile.mkdtemp(prefix='torque-')
    unittest.addModuleCleanup(shutil.rmtree, home, ignore_errors=True)
    os.environ.setdefault('PYTHONUSERBASE', site.getuserbase())     # croniter may be there
    os.environ['HOME'] = home
    for name in ('XDG_CONFIG_HOME', 'XDG_STATE_HOME'):
        os.environ.pop(name, None)


def load_tests(loader, tests, pattern):
    tests.addTests(doctest.DocTestSuite(torque))
    return tests


def main():
    if sys.argv[1:] == ['bench']:
        bench()
        return 0
    if sys.argv[1:2] == ['soak']:
        return soak(*sys.argv[2:3])
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's & has it ignored
    program = unittest.main(exit=False)
    result = program.result
    for reason, count in collections.Counter(why for _, why in result.skipped).items():
        print(f'{count} skipped: {reason}')
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    print(f'{result.testsRun - failed - len(result.skipped)} passed, {failed} failed, '
          f'{len(result.skipped)} skipped')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
