#!/usr/bin/env python3
"""torque: runs jobs on a schedule beside rTorrent.

    python3 torque.py -c torque.ini

One file, standard library only, Python 3.8 or newer; croniter is used where it is installed.
torque.ini names the jobs (job.NAME.handler = module:Class) and says when they run; they talk
to rTorrent by XML-RPC or JSON-RPC over SCGI or HTTP. Run with --help for the command line.

Sections, each using only what stands above it:

    Errors              what a user is shown as one line
    Values              text <-> bool, duration, size
    Schedule            when is the next run: pure functions of a date
    Scheduler           due times and the worker threads that meet them
    RPC                 SCGI and HTTP, XML-RPC and JSON-RPC, Transport
    Engine              one rTorrent: where it is, what it offers, its figures
    Files               what a path leads to, what rTorrent sees of it; whole copies
    Fields and Filter   what is known of a torrent; conditions on it
    Torrents            rows, lists in one round trip; metafiles
    Data                whose data it is; removals that are written down first
    Template            text and commands with values put in
    Jobs: base, figures Job, and the jobs that measure
    Jobs: torrents      the jobs that start, load, delete and move
    Config              torque.ini -> Config -> jobs
    Daemon              pid file, status, reload, what is remembered
    Web                 the page, figures for Prometheus, --demo, --grafana
    Command line        arguments, log, main

The life of a job: lines of the ini become values, the values of a job a planned job (Config),
that an object (make_jobs), and its run() a task of the scheduler, which is run when it is due
until cleanup() is called, once, at the end. A reload ends all of it and begins anew.

Threads: the main thread serves the scheduler, signals and reload. A job has a worker of its
own from its first run on, and nobody else calls its run(). A TreeWatch watches its folders in
one more, under the job's lock; pings, the status, the page, cleanups, the check before a reload
and the search for an rTorrent that is away have theirs. These only read what is the main
thread's, or hand it a function (calls). Engines are used by all; what they know of rTorrent is
replaced whole, never changed.

Exit status: 0 fine, 1 a job failed (--run-once, --status), 2 usage, 69 not running,
75 running already, 78 configuration.
"""
from __future__ import annotations

import sys

if __name__ == '__main__':              # nothing beside this file may shadow a library
    sys.path.append(sys.path.pop(0))

import ast
import binascii
import collections
import configparser
import contextlib
import errno
import fnmatch
import functools
import io
import itertools
import json
import logging
import math
import operator
import os
import queue
import re
import sched
import select
import shlex
import signal
import socket
import stat
import struct
import threading
import time
import traceback
import warnings
from datetime import datetime, timedelta
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Tuple

# What takes most of the start-up time is imported where it is needed: argparse, shutil,
# urllib.request, xmlrpc.client (brings ssl), zoneinfo and the like.

# An older Python shows this line, the first that it cannot read.
(torque_needs_python_3_8 := True)
VERSION = '1.0'
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING, EXIT_RUNNING, EXIT_CONFIG = 0, 1, 2, 69, 75, 78


# --- Errors ----------------------------------------------------------------------------------
# Every error that a user can cause or cure is a LoggableError: it is shown as one line, never
# as a traceback. The layer that finds it names the value; the layers above add the place.

class LoggableError(Exception):
    """Something went wrong that one line explains; `told` when the log has that line already."""
    exit_status = EXIT_FAILED
    told = False
    pause: float | None = None          # seconds that the other side asks to wait


class HeldBack(LoggableError):
    """A doubt about an item, or a limit: it is left alone for now, which is no failure."""


class UserError(LoggableError):
    """The configuration or the command line is wrong: nothing but its author can mend it.

    option: of which of its options a job speaks that is made.
    """
    exit_status = EXIT_CONFIG
    option = ''

    def __init__(self, *text, option=''):
        super().__init__(*text)
        self.option = option


class RpcError(LoggableError):
    """A call to rTorrent failed; `code` is the fault's code, None where there was no fault."""

    def __init__(self, message: str, code: int | None = None):
        super().__init__(message)
        self.code = code


class Unreachable(RpcError):
    """There was no answer at all: rTorrent is not there, silent, or broke off."""


class NoAnswer(Unreachable):
    """A server was there, and did not say anything."""


class HashNotFound(RpcError):
    """rTorrent has no item with this info-hash (any more)."""


# --- Values ----------------------------------------------------------------------------------
# Text of the ini enters: bool, seconds, bytes or a count leave. Numbers and hostile text enter:
# text leaves that a person reads at a glance, and that stays one line of a log. What is not
# understood is a UserError that names the value and what is allowed. Pure functions, for any
# thread.

TRUE = frozenset('yes true on y t 1 +'.split())
FALSE = frozenset('no false off n f 0 -'.split())
NUMBER = r'[0-9]{1,15}(?:\.[0-9]{1,15})?'
DURATION_UNITS = {
    'w': 604800,
    'd': 86400,
    'h': 3600,
    'm': 60,
    's': 1}
DURATION = re.compile(''.join(rf'(?:({NUMBER})\s*{unit}\s*)?' for unit in DURATION_UNITS))
# In seconds: dates and timeouts of the system hold no more than some centuries.
LONGEST = 10000 * DURATION_UNITS['w']
SIZE = re.compile(rf'({NUMBER})\s*([bkmgt]?)(?:i?b)?')
SHOWN_UNITS = {                         # and the digits behind the point
    'B': 0,
    'KiB': 0,
    'MiB': 1,
    'GiB': 1}


def parse_bool(text) -> bool:
    """Return the truth that a word stands for."""
    word = str(text).strip().lower()
    if word in TRUE:
        return True
    if word in FALSE:
        return False
    raise UserError(f'{text!r} is neither yes nor no; allowed are yes no true false on off 1 0')


def added_up(text, pattern, units) -> float | None:
    """Return the seconds in numbers with units; None for what is written as something else."""
    match = pattern.fullmatch(text)
    if not match or not text:
        return None
    numbers = map(float, match.groups('0'))
    return sum(map(operator.mul, numbers, units.values()))


def parse_duration(text) -> float:
    """Return the seconds in a length of time; a bare number is seconds.

    >>> parse_duration('1h30m'), parse_duration('0.25'), parse_duration(15)
    (5400.0, 0.25, 15.0)
    """
    # M stands for months elsewhere
    spelt = str(text).strip().replace('M', '?').lower()
    if re.fullmatch(NUMBER, spelt):
        spelt += 's'
    seconds = added_up(spelt, DURATION, DURATION_UNITS)
    if seconds is None or seconds > LONGEST:
        raise UserError(f'{text!r} is not a length of time; allowed are e.g. 15s 5m (minutes) '
                        '1h30m 2d, up to 10000w')
    return seconds


def parse_timeout(text) -> float:
    """Return the seconds in a length of time that is not 0."""
    seconds = parse_duration(text)
    if not seconds:
        raise UserError(f'{text!r} leaves no time for anything; allowed are e.g. 0.5s 30s 5m')
    return seconds


def parse_size(text) -> int:
    """Return the bytes in a size; units are powers of 1024.

    >>> parse_size('1.5k'), parse_size('4G')
    (1536, 4294967296)
    """
    match = SIZE.fullmatch(str(text).strip().lower())
    if not match:
        raise UserError(f'{text!r} is not a size; allowed are e.g. 100m 4g 1.5t')
    return int(float(match[1]) * 1024 ** 'bkmgt'.index(match[2]))


def parse_count(text) -> int:
    """Return a whole number, zero or more."""
    if not re.fullmatch('[0-9]{1,18}', str(text).strip()):
        raise UserError(f'{text!r} is not a whole number of 0 or more')
    return int(text)


def parse_port(text):
    """Return the number of a TCP port; 0 is any that is free."""
    port = parse_count(text)
    if port > 65535:
        raise UserError(f'{text!r} is no port; allowed are 0-65535')
    return port


def show_duration(seconds: float) -> str:
    """Return a length of time in its two largest units.

    >>> show_duration(273600), show_duration(59.9), show_duration(0.25)
    ('3d 4h', '59s', '250ms')
    """
    if 0 < seconds < 1:
        return f'{seconds * 1000:.0f}ms'
    left, parts = int(seconds), []
    for unit, size in DURATION_UNITS.items():
        number, left = divmod(left, size)
        if number:
            parts.append(f'{number}{unit}')
        elif parts:
            break
    return ' '.join(parts[:2]) or '0s'


def show_size(number: float) -> str:
    """Return bytes with a binary unit.

    >>> show_size(1258291), show_size(512)
    ('1.2 MiB', '512 B')
    """
    for unit, digits in SHOWN_UNITS.items():
        if abs(number) < 1024:
            return f'{number:.{digits}f} {unit}'
        number /= 1024
    return f'{number:.1f} TiB'


def counted(number, noun):
    """Return a number of things.

    >>> counted(1, 'file'), counted(0, 'file')
    ('1 file', '0 files')
    """
    text = f'{number} {noun}'
    if number != 1:
        text += 's'
    return text


CONTROL = {number: f'\\x{number:02x}' for number in [*range(32), *range(127, 160)]}
CONTROL.update({0x2028: '\\u2028', 0x2029: '\\u2029'})


def one_line(text):
    """Return text with control characters escaped, so that it stays one line of a log."""
    return text.translate(CONTROL).encode('utf-8', 'backslashreplace').decode()


def quoted(text, limit=200):
    """Return hostile text fit for one log line: quoted, escaped, not endless.

    >>> print(quoted('a\\nb'))
    'a\\nb'
    """
    shown = repr(str(text))
    if len(shown) > limit:
        shown = shown[:limit - 3] + '...'
    return shown


def scrubbed(text):
    """Return text without the passwords of URLs in it.

    >>> scrubbed('at http://me:secret@host/RPC2: refused')
    'at http://me:***@host/RPC2: refused'
    """
    # The limits let this take time in proportion to the text.
    return re.sub(r'(\w://[^\s:/@]{0,99}:)\S{0,999}@', r'\1***@', text)


def nearest(word, known):
    """Return `; did you mean ...?` for a misspelt word, or nothing."""
    import difflib
    for close in difflib.get_close_matches(word, known, 1):
        return f'; did you mean {close!r}?'
    return ''


# --- Schedule --------------------------------------------------------------------------------
# Text enters, a Schedule leaves; its next(after) maps Unix seconds to the first due time after
# them. Nothing here looks at a clock or knows of threads. An Interval counts elapsed seconds
# from a start. A Calendar matches wall time: `wall` is a naive datetime as a clock on the wall
# shows it, and a clock change is where the distance between wall and Unix seconds (the offset)
# jumps.

WEEKDAYS = tuple('mon tue wed thu fri sat sun'.split())
MONTHS = tuple('jan feb mar apr may jun jul aug sep oct nov dec'.split())
POSITIONS = {'1st': 0, '2nd': 1, '3rd': 2, '4th': 3, '5th': 4, 'last': -1}
SECOND, MINUTE, HOUR, DAY = (timedelta(seconds=number) for number in (1, 60, 3600, 86400))
# A field's part: *, a, a-b, each perhaps with /step.
PART = re.compile(r'(?:(\*)|(\w+)(?:-(\w+))?)(?:/([0-9]{1,9}))?')
# What is no cron expression: one word, or a number with a unit, of which cron's hours have none.
INTERVAL = re.compile(r'(?i)\S+$|@?every\b|[\d.]+ ?[a-z]')


class Field(NamedTuple):
    """One part of a calendar schedule: its range, and the names of its values."""
    name: str
    low: int
    high: int
    names: tuple = ()


FIELDS = {field.name: field for field in (      # from the coarsest to the finest
    Field('year', 1970, 9999),
    Field('month', 1, 12, MONTHS),
    Field('day', 1, 31),
    Field('week', 1, 53),
    Field('day_of_week', 0, 6, WEEKDAYS),
    Field('hour', 0, 23),
    Field('minute', 0, 59),
    Field('second', 0, 59))}
CRON_WEEKDAY = Field('day of week', 0, 7, WEEKDAYS[6:] + WEEKDAYS[:6])
CRON_FIELDS = ('minute', 'hour', 'day', 'month', 'day_of_week')
CRON_NAMES = {
    '@hourly': '0 * * * *',
    '@daily': '0 0 * * *',
    '@midnight': '0 0 * * *',
    '@weekly': '0 0 * * 0',
    '@monthly': '0 0 1 * *',
    '@yearly': '0 0 1 1 *',
    '@annually': '0 0 1 1 *'}


def field_value(word, field):
    """Return the number that a word means in a field: digits, or a name such as `mon`."""
    if word in field.names:
        return field.names.index(word) + field.low
    if re.fullmatch('[0-9]{1,4}', word) and field.low <= int(word) <= field.high:
        return int(word)
    allowed = f'{field.low}-{field.high}'
    if field.names:
        allowed += f' or {field.names[0]} ... {field.names[-1]}'
    raise UserError(f'{field.name} {word!r} is not in {allowed}')


def parse_part(part, field):
    """Return the numbers of one part of a field; for a position, its (index, weekday).

    part ::= ('*' | value | value '-' value) ['/' step]
    position ::= 'last' | ('1st' ... '5th' | 'last') weekday      (of the field `day` alone)
    """
    position, _, weekday = part.partition(' ')
    if field.name == 'day' and position in POSITIONS:
        if weekday:
            return [(POSITIONS[position], field_value(weekday.strip(), FIELDS['day_of_week']))]
        if position == 'last':
            return [(-1, None)]
    match = PART.fullmatch(part)
    if not match:
        raise UserError(f'{field.name} {part!r} is not understood; '
                        'allowed are * */n a a-b a-b/n and lists of these')
    star, first, last, step = match.groups()
    span = field.high - field.low
    # Of weekdays there are seven, though 0 and 7 are Sunday in cron
    size = len(field.names) or span + 1
    low, high = field.low, field.low + size - 1
    if not star:
        low = field_value(first, field)
        if last:
            high = field_value(last, field)
        elif not step:
            high = low
    if step and not 0 < int(step) <= span:
        raise UserError(f'{field.name} {part!r} has a step that is not in 1-{span}')
    if low > high:
        if field.name == 'year':
            raise UserError(f'year {part!r} is an empty range')
        # All others go round
        high += size
    numbers = range(low, high + 1, int(step or 1))
    return [(number - field.low) % size + field.low for number in numbers]


def parse_field(text, field) -> set:
    """Return the numbers that a field allows; for a position among days (its index, weekday).

    field ::= (part | position) (',' (part | position))*

    >>> sorted(parse_field('0-20/10,30', FIELDS['minute']))
    [0, 10, 20, 30]
    """
    parts = [parse_part(part.strip(), field) for part in text.lower().split(',')]
    return set().union(*parts)


class Schedule:
    """When a job is due. `jitter` is the most seconds a run may be put off, at random."""
    jitter = 0.0
    elapsed = False                     # True: next() takes and gives elapsed, not Unix seconds
    every_hour = True                   # follows real time through clock changes
    zone = None                         # local time

    def next(self, after: float) -> float | None:
        """Return the first due time after `after`, None when there is none any more."""
        raise NotImplementedError


class Interval(Schedule):
    """Every so many seconds, counted from `start` without drift.

    >>> Interval(15).next(31)
    45.0
    """
    elapsed = True

    def __init__(self, seconds):
        self.seconds = seconds
        self.start = 0.0

    def next(self, after):
        # By multiplication, so that rounding does not add up; it may still give `after` itself.
        due = self.start + ((after - self.start) // self.seconds + 1) * self.seconds
        if due <= after:
            due += self.seconds
        return due


def allowed_numbers(texts, fields) -> dict[str, set]:
    """Return the numbers that each field allows, of those that are left out as well."""
    names = list(fields)
    finest = max(map(names.index, texts))
    allowed = {}
    for index, (name, field) in enumerate(fields.items()):
        text = '*'
        if index > finest and name not in ('week', 'day_of_week'):
            text = str(field.low)
        allowed[name] = parse_field(texts.get(name, text), field)
    return allowed


class Calendar(Schedule):
    """Wall times whose every part is allowed, in local time or the time zone `zone`.

    texts: the fields that are given, by name; those left out are `*`, but finer than the
    finest given one they start at their lowest value. cron: Sunday is 0, and day and
    day_of_week are alternatives where both are restricted. Where every hour is allowed, due times
    follow real time through clock changes. Else they keep to the wall: what a change skips
    is one run right after the gap, what comes twice runs the first time.
    """
    # More than the days of 400 years, after which the calendar repeats.
    MOST_STEPS = 160000

    def __init__(self, texts, zone=None, cron=False):
        self.zone = zone
        self.either = False
        if cron:
            self.allowed = allowed_numbers(texts, {**FIELDS, 'day_of_week': CRON_WEEKDAY})
            self.allowed['day_of_week'] = {(day + 6) % 7 for day in self.allowed['day_of_week']}
            # As cron(5) has it: a field that begins with *, even */2, restricts nothing.
            self.either = '*' not in (texts['day'][0], texts['day_of_week'][0])
        else:
            self.allowed = allowed_numbers(texts, FIELDS)
        self.every_hour = len(self.allowed['hour']) == 24

    def fits_day(self, wall):
        """Tell whether a day is allowed, in a month that is."""
        weekday = wall.weekday()
        marks = {wall.day, ((wall.day - 1) // 7, weekday)}
        if (wall + 7 * DAY).month != wall.month:
            marks.add((-1, weekday))
        if (wall + DAY).month != wall.month:
            marks.add((-1, None))
        marked = not marks.isdisjoint(self.allowed['day'])
        on_weekday = weekday in self.allowed['day_of_week']
        if wall.isocalendar()[1] not in self.allowed['week']:
            return False
        if self.either:
            return marked or on_weekday
        return marked and on_weekday

    def wall_from(self, wall):
        """Return the first allowed wall time that is `wall` or later; ValueError: there is none."""
        allowed = self.allowed
        for _ in range(self.MOST_STEPS):
            if wall.year not in allowed['year'] or wall.month not in allowed['month']:
                wall = (datetime(wall.year, wall.month, 28) + 4 * DAY).replace(day=1)
            elif not self.fits_day(wall):
                wall = datetime(wall.year, wall.month, wall.day) + DAY
            elif wall.hour not in allowed['hour']:
                wall = wall.replace(minute=0, second=0) + HOUR
            elif wall.minute not in allowed['minute']:
                wall = wall.replace(second=0) + MINUTE
            elif wall.second not in allowed['second']:
                wall += SECOND
            else:
                return wall
        raise ValueError('there is no such date')

    def wall(self, seconds) -> datetime:
        """Return the naive wall time at Unix seconds."""
        return datetime.fromtimestamp(seconds, self.zone).replace(tzinfo=None)

    def unix(self, wall):
        """Return when the wall shows a time first, or one after it where a change skips it."""
        # Of a time that is skipped, one is before the change, of one that comes twice, the first.
        seconds = min(wall.replace(tzinfo=self.zone, fold=fold).timestamp() for fold in (0, 1))
        first = int(seconds)
        while self.wall(first) < wall:
            first += 1
        return first

    def next(self, after):
        """Return the first due time after `after`; before the year 10000, else None."""
        find = self.by_wall
        if self.every_hour:
            find = self.by_real_time
        try:
            return find(math.floor(after))
        # No such date, or beyond the year 9999
        except (OverflowError, ValueError):
            return None

    def by_real_time(self, after):
        """Return the first second after `after` whose wall time is allowed."""
        second = after + 1
        while True:
            wall = self.wall(second)
            due = self.wall_from(wall)
            if due == wall:
                return second
            # No two changes lie within a day
            end = self.unix(due - DAY)
            ahead = min(due - wall, DAY) // SECOND
            # Go near the change that is on the way
            while self.wall(second + ahead) != wall + ahead * SECOND:
                end = second + 1
                ahead //= 2
            second = max(second + ahead, end)

    def by_wall(self, after):
        """Return the first second after `after` that is allowed and not a repetition."""
        wall = self.wall(after)
        while True:
            wall = self.wall_from(wall + SECOND)
            due = self.unix(wall)
            if due > after:
                return due


class Croniter(Calendar):
    """A cron expression beyond torque's grammar, as the croniter package reads it."""

    def __init__(self, text, zone=None):
        try:
            import croniter                         # type: ignore
            croniter.croniter(text, datetime(2000, 1, 1))
        except ImportError:
            raise UserError(f'{text!r} needs croniter, which is not installed; without it cron '
                            'has five fields of * */n a a-b a-b/n and names') from None
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f'croniter refuses {text!r}: {error}') from None
        self.text = text
        self.croniter = croniter.croniter
        self.zone = zone
        self.every_hour = text.split()[1] == '*'

    def wall_from(self, wall):
        return self.croniter(self.text, wall - SECOND).get_next(datetime)


def parse_zone(name):
    """Return the time zone named `Area/City`."""
    try:
        import zoneinfo
        return zoneinfo.ZoneInfo(name)
    except ImportError:
        raise UserError(f'timezone {name!r} needs Python 3.9; local time does not') from None
    except (KeyError, ValueError, OSError):
        raise UserError(f'timezone {name!r} is not known on this machine; allowed are names '
                        'such as Europe/Berlin, where time zone data is installed') from None


def parse_interval(text: str) -> Interval:
    """Return the Interval of `every 15s`, `@every 15s` or `15s`."""
    length = re.sub(r'(?i)^@?every\s*', '', text)
    if '@' in length or f'@{text.lower()}' in CRON_NAMES:
        raise UserError(f"{text!r} is no schedule; allowed are {' '.join(CRON_NAMES)}, and "
                        '@every 5m, which runs at the start, too')
    seconds = parse_duration(length)
    if seconds < 0.1:
        raise UserError(f'interval {text!r} is too short; at least 0.1s is allowed')
    return Interval(seconds)


def parse_cron(text: str, zone) -> Schedule:
    """Return the Schedule of a cron expression; what torque does not know is croniter's."""
    words = text.split()
    unnamed = re.sub('|'.join(WEEKDAYS + MONTHS), '', text.lower())
    if len(words) in (6, 7) or len(words) == 5 and re.search('[lw#?]', unnamed):
        return Croniter(text, zone)
    if len(words) != 5:
        raise UserError(f"{text!r} has {counted(len(words), 'word')}; cron has five fields: "
                        'minute hour day month weekday')
    return Calendar(dict(zip(CRON_FIELDS, words)), zone, cron=True)


def parse_words(text: str) -> tuple[dict[str, str], str]:
    """Return the fields of a schedule by name, and the words that are none of them."""
    fields, plain = {}, []
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f'schedule {text!r}: {error}') from None
    for word in words:
        name, equals, value = word.partition('=')
        if not equals:
            plain.append(word)
        elif name in fields:
            raise UserError(f'schedule field {name!r} is given twice')
        elif name not in (*FIELDS, 'jitter', 'timezone'):
            raise UserError(f'schedule field {name!r} is not known; allowed are '
                            f"{' '.join(FIELDS)} jitter timezone{nearest(name, FIELDS)}")
        else:
            fields[name] = value
    return fields, ' '.join(plain)


def parse_schedule(text: str) -> Schedule:
    """Return the Schedule that a text spells: an interval, fields, or cron.

    schedule ::= (interval | fields | cron) ['jitter=' duration] ['timezone=' Area/City]

    >>> parse_schedule('every 1h30m').next(0), parse_schedule('*/5 * * * *').next(60)
    (5400.0, 300)
    """
    fields, plain = parse_words(text)
    jitter = parse_duration(fields.pop('jitter', 0))
    zone = None
    if 'timezone' in fields:
        zone = parse_zone(fields.pop('timezone'))
    if bool(fields) == bool(plain):
        raise UserError(f'schedule {text!r} is not understood; allowed are an interval '
                        '(every 15s), fields (hour=3 "day=3rd sun") or cron (*/5 * * * *)')
    cron = CRON_NAMES.get(plain.lower(), plain)
    schedule: Schedule
    if fields:
        schedule = Calendar(fields, zone)
    elif INTERVAL.match(cron):
        if zone:
            raise UserError(f'{text!r}: an interval has no timezone; allowed are fields or cron')
        schedule = parse_interval(cron)
    else:
        schedule = parse_cron(cron, zone)
    schedule.jitter = jitter
    return schedule


# --- Scheduler -------------------------------------------------------------------------------
# Tasks enter: a name, a Schedule, and a function to call. Two queues of the library's sched hold
# what is due, one by Unix seconds and one by elapsed seconds (which no clock change touches, and
# which go on while the machine sleeps). The main thread serves both; each task that was ever due
# has a worker thread of its own, so that it cannot overlap itself and nobody waits for another.
# A due time is a moment at which a run should begin; those that come during a run, or while
# everything was held up, are counted and become one run.

MAX_SLEEP = 30                  # seconds; a changed clock is noticed within this time
THREAD_PAUSE = 1.0              # seconds until a thread that was refused is asked for again
MOST_COUNTED = 1000             # due times that are counted one by one
TRACE = 5                       # log level of --debug: tracebacks of any failure


def elapsed_time():
    """Return seconds that no clock change touches; where the system can, sleep counts too."""
    return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))


def no_pause(seconds):
    """Take the place of the sleep of 0 s that sched has after each event.

    It hands the interpreter to another thread each time, and makes 1,000 events twice as late.
    """


def in_thread(function, *args):
    """Start a function in a thread; RuntimeError where there can be none."""
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


class Repeats:
    """Tells which of many like events deserve a line in the log.

    The first does, and so do later ones after pauses that double from one minute to one hour.
    """
    MOST_KINDS = 100
    FORGOTTEN = 7200.0                  # seconds without a line, after which all begins anew

    def __init__(self):
        # Kind -> when it was told last, and the pause from then on, in elapsed seconds.
        self.kinds = {}

    def deserve_line(self, kind):
        """Tell whether an event that happens now is to be told."""
        now = elapsed_time()
        told, pause = self.kinds.get(kind, (-self.FORGOTTEN, 0.0))
        if now < told + pause:
            return False
        if now >= told + self.FORGOTTEN:
            pause = 30.0
        if len(self.kinds) >= self.MOST_KINDS:
            self.kinds.clear()
        self.kinds[kind] = now, min(pause * 2, 3600.0)
        return True


def error_text(error):
    """Return the text of an error; its class where there is none, or that is broken, too."""
    with contextlib.suppress(Exception):
        return str(error) or type(error).__name__
    return type(error).__name__


def kind_of_error(error):
    """Return what errors have in common that are the same but for names and numbers in them."""
    trace = error.__traceback__
    if isinstance(error, LoggableError) or trace is None:
        text = f'{type(error).__name__}: {error_text(error)}'[:1000]
        return re.sub(r"""'[^']*'|"[^"]*"|\b[\da-fA-F]{8,}\b|[\d.]+""", '#', text)
    while trace.tb_next:
        trace = trace.tb_next
    return type(error), trace.tb_frame.f_code, trace.tb_lineno


def end_child(error):
    """End a process that a job has forked and that comes back here: it is no second torque."""
    status = error
    if isinstance(error, SystemExit):
        status = error.code
    if not isinstance(status, int):
        status = int(status is not None)
    os._exit(status)


class Task:
    """One job as the scheduler sees it, and how it has gone so far.

    Its worker writes how runs went; the main thread writes when it is due. `waiting` is guarded
    by the scheduler's lock.
    """
    TOLD = ('name', 'state', 'dry_run', 'running_since', 'last_start', 'last_duration', 'runs',
            'failures', 'missed', 'last_error')         # by --status
    at_start = False                    # a calendar task is due at once, too
    dry_run = False                     # it changes nothing
    due: float | None = None            # in the clock of the schedule
    last_due = 0.0
    waiting = 0                         # due times without a run so far
    worker: threading.Thread | None = None
    running_since: float | None = None  # Unix seconds
    last_start: float | None = None     # Unix seconds
    last_duration: float | None = None
    last_error: str | None = None
    overdue_run = -1                    # the run, counted from 0, that took too long
    runs = 0
    failures = 0
    missed = 0                          # due times that were merged into others
    failed_times = 0                    # since it failed for the first time, or once more
    failing_since = 0.0                 # elapsed seconds
    told_kind = None                    # of the failure that the log had last since then

    def __init__(self, name, schedule, run, max_runtime=None):
        self.name = name
        self.schedule = schedule
        self.run = run
        self.max_runtime = max_runtime          # seconds
        self.log = logging.getLogger('torque.' + name)
        self.repeats = Repeats()
        self.wake = threading.Lock()            # released when it is due
        self.wake.acquire()

    @property
    def state(self):
        """Return a word for --status."""
        if self.running_since is None:
            return 'idle'
        if self.overdue_run == self.runs:
            return 'overdue'
        return 'running'

    def attempt(self):
        """Call the function once, and log how it went."""
        pid = os.getpid()
        error = None
        try:
            self.run()
        except BaseException as raised:
            # SystemExit, too, must not end a worker.
            error = raised
        if os.getpid() != pid:
            end_child(error)
        if error is None:
            self.worked()
        else:
            self.failed(error)

    def failed(self, error):
        """Count a failure and log it: in full once, then summed up."""
        level, trace = logging.WARNING, None
        text = scrubbed(error_text(error))
        if not isinstance(error, LoggableError):
            level, trace = logging.ERROR, error
            text = f'{type(error).__name__}: {text}'
        self.failures += 1
        self.last_error = text
        if not self.failed_times:
            self.failing_since = elapsed_time()
        self.failed_times += 1
        kind = kind_of_error(error)
        if getattr(error, 'told', False) or not self.repeats.deserve_line(kind):
            self.log.debug('failed again: %s', text)
            return
        if kind == self.told_kind:
            seconds = elapsed_time() - self.failing_since
            text = f'still failing, {self.failed_times} times in {show_duration(seconds)}: {text}'
            trace = None
        if self.log.isEnabledFor(TRACE):
            trace = error
        self.told_kind = kind
        self.log.log(level, '%s', text, exc_info=trace)

    def worked(self):
        """Note that a run went well, and say so when the last failure was said."""
        if self.told_kind is not None:
            self.log.info('works again, after %s in %s', counted(self.failed_times, 'failure'),
                          show_duration(elapsed_time() - self.failing_since))
        self.last_error = self.told_kind = None
        self.failed_times = 0


class Scheduler:
    """Has tasks run when they are due, each in a worker thread of its own.

    step() and what it calls belong to the main thread, work() to the workers. Tests pass clocks
    of their own and call step().
    """
    stopping = False
    hurry = False                       # what is in progress is not waited for

    def __init__(self, wall=time.time, elapsed=elapsed_time):
        self.wall = wall
        self.elapsed = elapsed
        self.offset = wall() - elapsed()
        self.calendar = sched.scheduler(wall, no_pause)
        self.intervals = sched.scheduler(elapsed, no_pause)

        self.tasks: dict[str, Task] = {}
        self.lock = threading.Lock()
        # Functions that the main thread is to call now, None to wake it. SimpleQueue is the one
        # thing in the library that a signal handler may put to while the same thread is in it.
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        self.repeats = Repeats()
        self.log = logging.getLogger('torque.scheduler')

    def add(self, task):
        """Register a task; an interval is due now, a calendar at its next date."""
        self.tasks[task.name] = task
        now = task.due = self.clock_of(task).timefunc()
        if isinstance(task.schedule, Interval):
            task.schedule.start = now
        elif not task.at_start:
            task.due = task.schedule.next(now)
        self.enter(task)
        return task

    def clock_of(self, task):
        """Return the queue that the due times of a task go by."""
        if task.schedule.elapsed:
            return self.intervals
        return self.calendar

    def enter(self, task):
        """Enter the next due time of a task, put off by its jitter."""
        if task.due is None:
            return
        delay = 0.0
        if task.schedule.jitter:
            import random
            delay = random.uniform(0, task.schedule.jitter)
        self.clock_of(task).enterabs(task.due + delay, 0, self.come_due, (task, delay))

    def next_run(self, task) -> float | None:
        """Return the Unix seconds of a task's next due time."""
        if task.due is None or not task.schedule.elapsed:
            return task.due
        return self.wall() + task.due - self.elapsed()

    def step(self):
        """Wake the tasks that are due; return the seconds until this is to be called again."""
        offset = self.wall() - self.elapsed()
        back = self.offset - offset
        self.offset = offset
        if back > 0.5:
            self.set_back()
            self.log.info('the clock was set back by %s', show_duration(back))
        until = self.elapsed() + MAX_SLEEP
        for clock in (self.calendar, self.intervals):
            delay = clock.run(blocking=False)
            if delay is not None:
                until = min(until, self.elapsed() + delay)
        return max(until - self.elapsed(), 0)

    def set_back(self):
        """Enter all dates anew, for the wall clock was set back.

        A small step repeats no run. After a big one the last run belongs to a future that was
        wrong: it says nothing of what is due now.
        """
        self.calendar = sched.scheduler(self.wall, no_pause)
        now = self.wall()
        for task in self.tasks.values():
            if task.schedule.elapsed:
                continue
            believed = 3 * 3600
            if task.schedule.every_hour:
                believed = 60
            if task.last_due >= now + believed:
                task.last_due = now
            task.due = task.schedule.next(max(now, task.last_due))
            self.enter(task)

    def come_due(self, task, delay):
        """Count the due times that have passed, enter the next one, wake the task."""
        now = self.clock_of(task).timefunc()
        times = 0
        while task.due is not None and task.due + delay <= now:
            times += 1
            task.last_due = after = task.due
            if times > MOST_COUNTED:
                after = now
            task.due = task.schedule.next(after)
        self.enter(task)
        with self.lock:
            asleep = not task.waiting
            task.waiting += times
        if times and asleep:
            self.wake(task)

    def wake(self, task):
        """Let the worker of a task begin; start it where there is none yet."""
        if task.worker is None:
            try:
                task.worker = in_thread(self.work, task)
            except RuntimeError as error:
                # No more threads: its due times stay counted, and it is tried again.
                self.intervals.enter(THREAD_PAUSE, 0, self.wake, (task,))
                if self.repeats.deserve_line('threads'):
                    self.log.error('no new worker thread: %s', error)
                return
        task.wake.release()

    def work(self, task):
        """Run a task each time it is woken; the thread of that task."""
        while True:
            task.wake.acquire()
            with self.lock:
                if self.stopping:
                    return
                merged = task.waiting - 1
                task.waiting = 0
                task.running_since = task.last_start = self.wall()
            task.missed += merged
            # What is called here may raise anything, the filters of a log, too.
            with contextlib.suppress(BaseException):
                if merged and task.repeats.deserve_line('merged'):
                    task.log.info('%d runs came due before this one could begin, merged into '
                                  'one', merged + 1)
            with contextlib.suppress(BaseException):
                self.run_task(task)
            task.running_since = None
            task.runs += 1
            if self.stopping:
                # The main thread may be in finish(), and wait for the last run.
                self.calls.put(None)

    def run_task(self, task):
        """Run a task once, and measure it."""
        started = self.elapsed()
        event = None
        if task.max_runtime:
            # Before Python 3.10 events of the same time and priority are equal, and cancel()
            # takes the wrong one: that of each task has a priority of its own.
            event = self.intervals.enter(task.max_runtime, id(task), self.call_overdue,
                                         (task, task.runs))
            # The main thread may be asleep for longer than that.
            self.calls.put(None)
        try:
            task.attempt()
        finally:
            task.last_duration = self.elapsed() - started
            if event:
                # The caller passes over what it raises when the event has happened.
                self.intervals.cancel(event)

    def call_overdue(self, task, run):
        """Say of a run that it takes longer than it may, unless it has just ended."""
        if task.runs != run:
            return
        task.overdue_run = run
        if task.repeats.deserve_line('overdue'):
            task.log.warning('still running after %s, its max_runtime',
                             show_duration(task.max_runtime))

    def running(self):
        """Return the tasks that are running now."""
        return [task for task in self.tasks.values() if task.running_since is not None]

    def wait(self, seconds):
        """Sleep, but not longer than until there is a call to make; make it."""
        try:
            function = self.calls.get(timeout=seconds)
            if function:
                function()
        except queue.Empty:
            pass
        except Exception:
            self.log.exception('this should not happen')

    def serve(self, chore):
        """Run tasks until stop() is called; the chore is called every MAX_SLEEP or sooner."""
        while not self.stopping:
            seconds = THREAD_PAUSE
            try:
                chore()
                seconds = self.step()
            except Exception:
                self.log.exception('this should not happen')
            self.wait(seconds)

    def stop(self):
        """Let serve() return; no new runs start."""
        with self.lock:
            self.stopping = True

    def finish(self, grace):
        """Wait up to `grace` seconds for runs in progress; return those that still run."""
        end = self.elapsed() + grace
        while self.running() and not self.hurry and self.elapsed() < end:
            self.wait(max(end - self.elapsed(), 0))
        return self.running()


# --- RPC -------------------------------------------------------------------------------------
# A scgi_url becomes an Address. The body of a request goes to it, and the body of the answer
# comes back within a deadline, over SCGI (one netstring of headers, one request a connection)
# or HTTP. Calls, (method, *params) each, become such bodies in XML-RPC or JSON-RPC, and answers
# become values. "where" is an address as it may be shown: never with a password. No state, and
# any thread. Unreachable: no answer came; any other RpcError: rTorrent answered, but not so.

# Seconds for a whole call
RPC_TIMEOUT = 30.0
# Bytes of one answer
RPC_LIMIT = 64 << 20
# Most times the limit that a value may take in memory, beside its answer
WEIGHT = 5
# Codes of faults: there is no such command
MISSING = (-506, -32601)
# Calls in one request; rTorrent takes 512 KiB at most
BATCH = 500
KINDS_OF_PORT = 'scgi:// is for the port of rTorrent itself, http:// for a web server'
LOOPBACK = re.compile(r'localhost$|127\.|::1$')


class Address(NamedTuple):
    """Where rTorrent answers: kind is unix, tcp or http; `where` is fit for the log."""
    kind: str
    where: str
    path: str = ''
    host: str = ''
    port: int = 0
    login: tuple = ()                   # user, password
    exposed: bool = False               # rTorrent's port is open to the network

    def __repr__(self):
        return f'<Address {self.where}>'

    def is_local(self) -> bool:
        """Tell whether rTorrent runs on this machine, as far as the address shows."""
        return not self.host or bool(LOOPBACK.match(self.host))


def redacted(text):
    """Return a URL, or what was meant to be one, without the password in it.

    >>> redacted('http://me:secret@host/RPC2')
    'http://me:***@host/RPC2'
    """
    return re.sub(r'(?s)^((?:\w+:?//)?[^:/@]*):.*@', r'\1:***@', str(text))


def parse_address(text: str) -> Address:
    """Return the Address that a scgi_url spells; variables and ~ in it are expanded.

    >>> parse_address('scgi://:5000').host, parse_address('scgi:///x.sock').path
    ('127.0.0.1', '/x.sock')
    """
    refused = UserError(f'{redacted(text)!r} is no address; allowed are scgi://host:port, '
                        'scgi:///path, a socket path, http(s)://[user:password@]host/RPC2')
    meant = os.path.expandvars(text.strip())
    if '://' not in meant:
        meant = 'scgi://' + meant
    if meant.startswith(('scgi:///', 'scgi://~')) and '\0' not in meant:
        path = os.path.expanduser(meant[7:])
        return Address('unix', f'scgi://{path}', path)
    from urllib.parse import unquote, urlsplit
    try:
        url = urlsplit(meant)
        host, port = url.hostname or '', url.port or 0
    # What it says may hold a password
    except ValueError:
        raise refused from None
    netloc = url.netloc.rpartition('@')[2]
    if url.scheme in ('http', 'https') and host and not url.query and not url.fragment:
        clean = f"{url.scheme}://{netloc}{url.path or '/RPC2'}"
        login = unquote(url.username or ''), unquote(url.password or '')
        return Address('http', clean, clean, host, port, login)
    if url.scheme != 'scgi' or not port or url.path.strip('/'):
        raise refused
    exposed = not LOOPBACK.match(host)
    if host in ('', '0.0.0.0', '::'):
        host = '127.0.0.1'
    return Address('tcp', f'scgi://{netloc}', '', host, port, exposed=exposed)


def beginning(content):
    """Return the first bytes of an answer, quoted."""
    return quoted(bytes(content[:80]).decode('utf-8', 'replace'))


TROUBLE = {
    FileNotFoundError: 'there is no such socket: not running?',
    ConnectionRefusedError: 'nobody listens there: not running?',
    ConnectionError: 'the connection was closed during the request: too large for it?',
    socket.gaierror: 'the host name cannot be resolved',
    socket.timeout: 'no connection in time'}


def describe(error):
    """Return what to say of an error on the way to a server."""
    # urllib wraps what happened
    error = getattr(error, 'reason', error)
    for kind, text in TROUBLE.items():
        if isinstance(error, kind):
            return text
    return f'no usable answer: {quoted(error)}'


def receive(sock, seconds, limit, start=b'') -> bytearray:
    """Return what comes over a connection until the other side closes it: an answer.

    What does not begin with `start` is not read to its end.
    """
    received, chunk = bytearray(), b'?'
    end = time.monotonic() + seconds
    while chunk and received[:len(start)] == start[:len(received)]:
        sock.settimeout(max(end - time.monotonic(), 0.001))
        try:
            chunk = sock.recv(1 << 18)
        except socket.timeout:
            if received:
                came = counted(len(received), 'byte')
                raise Unreachable(f'only {came} came in {seconds:g} s') from None
            raise NoAnswer(f'connected, but no answer in {seconds:g} s: busy, hung, or another '
                           'kind of server') from None
        # It refused what it had not read yet
        except ConnectionError:
            chunk = b''
        received += chunk
        if len(received) > limit:
            raise RpcError(f'the answer is larger than {show_size(limit)}, the limit (rpc_limit)')
    if not received:
        raise NoAnswer('the connection was closed without an answer')
    return received


def connect(address, seconds):
    """Return a socket that is connected to rTorrent."""
    if address.kind == 'tcp':
        return socket.create_connection((address.host, address.port), seconds)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(seconds)
    try:
        sock.connect(address.path)
    except OSError:
        sock.close()
        raise
    return sock


def scgi_request(address, body, content_type, seconds, limit):
    """Send one SCGI request and return the body of its answer.

    Raises RpcError; the text says what happened, the caller adds where and which method.
    """
    # Another kind of server answers at the end of a line, but would wait for it
    body += b'\r\n\r\n'
    head = f'CONTENT_LENGTH\0{len(body)}\0SCGI\0001\0CONTENT_TYPE\0{content_type}\0'
    try:
        with connect(address, seconds) as sock:
            sock.sendall(b'%d:%s,%s' % (len(head), head.encode(), body))
            received = receive(sock, seconds, limit, b'Status:')
    except OSError as error:
        trouble = describe(error)
        if os.path.isfile(address.path) or os.path.isdir(address.path):
            trouble = 'this is no socket; scgi_url is what network.scgi.open_local of rTorrent says'
        raise Unreachable(trouble) from None
    start, _, content = received.partition(b'\r\n\r\n')
    size = re.search(rb'\ncontent-length: {0,9}(\d{1,15})', start, re.I)
    if not size or not start.startswith(b'Status:'):
        raise Unreachable(f'the answer is not one of rTorrent: {beginning(received)}; '
                          + KINDS_OF_PORT)
    if len(content) < int(size[1]):
        raise Unreachable(f"the answer broke off after {counted(len(received), 'byte')}")
    return content


class HttpAnswer(NamedTuple):
    """What a web server said."""
    status: int
    reason: str
    headers: Any                        # .get() takes a name in any case
    body: bytes


class Received(io.BytesIO):
    """A whole answer, which http.client reads as from a socket."""

    def makefile(self, mode):
        return self

    # An HTTPResponse that nobody closed is closed after this, and complains
    def close(self):
        pass


def http_opener(url, login, seconds, limit):
    """Return urllib's opener: with proxies and both kinds of login, but no redirections."""
    import http.client
    import urllib.request as lib

    class Handler(lib.HTTPHandler, lib.HTTPSHandler):
        def do_open(self, http_class: Any, *args, **options):
            class Connection(http_class):
                def getresponse(self):
                    received: Any = Received(receive(self.sock, seconds, limit))
                    answer = http.client.HTTPResponse(received)
                    answer.begin()
                    return answer

            return super().do_open(Connection, *args, **options)

        # Any status is an answer
        def http_error_default(self, request, answer, *args):
            return answer

    handlers: list[Any] = [Handler(), lib.HTTPErrorProcessor()]
    if any(login):
        passwords = lib.HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, url, *login)
        digest: Any = lib.HTTPDigestAuthHandler(passwords)
        # One try; urllib would make six
        digest.retried = 5
        handlers += [digest, lib.HTTPBasicAuthHandler(passwords)]
    if not re.match(r'https?://(localhost|127\.|\[::1\])', url):
        handlers.append(lib.ProxyHandler())
    opener = lib.OpenerDirector()
    opener.addheaders = [('User-Agent', f'torque/{VERSION}')]
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def http_post(url, body: bytes, headers, seconds, limit=1 << 20, login=()) -> HttpAnswer:
    """POST to a web server; it may ask for a login by basic or digest authentication.

    Redirections are not followed. Raises Unreachable when there is no whole answer in time.
    """
    import http.client
    import urllib.request
    opener = http_opener(url, login, seconds, limit)
    try:
        answer = opener.open(urllib.request.Request(url, body, headers), timeout=seconds)
        return HttpAnswer(answer.status, answer.reason, answer.headers, answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(describe(error)) from None


def http_request(address, body, content_type, seconds, limit):
    """Send a request to an HTTP mount of rTorrent and return the body of its answer.

    What rTorrent says comes through with any status and content type.
    """
    answer = http_post(address.path, body, {'Content-Type': content_type}, seconds, limit,
                       address.login)
    start = answer.body[:1000]
    if b'<methodResponse' in start or b'"jsonrpc"' in start:
        return answer.body
    raise Unreachable(f'HTTP {answer.status} {answer.reason} instead of an answer of '
                      f'rTorrent: {beginning(answer.body)}')


def typed(answer, unknown):
    """Return an answer if it is of the same type as `unknown`, else that."""
    if isinstance(answer, type(unknown)):
        return answer
    return unknown


def rpc_fault(fault) -> RpcError:
    """Return the exception for a fault; wordings differ, -506 alone is the same everywhere."""
    found = typed(fault, {})
    found = typed(found.get('error', found), {})
    code = found.get('faultCode', found.get('code'))
    message = str(found.get('faultString', found.get('message', fault)))
    said = f'fault {code}: {quoted(message)}'
    if 'info-hash' in message:
        return HashNotFound(said, code)
    if 'untrusted' in message:
        said += ('; the web server in between marks its connections as untrusted: '
                 'use scgi:// here')
    return RpcError(said, code)


def json_text(content, limit):
    """Return JSON text; RpcError where its value would take too much memory."""
    # In CPython one emoji makes all characters of a text take 4 bytes; a value takes 90 bytes at
    # most, beside its text
    width = 2
    if not content.isascii():
        width = 8
    values = sum(map(content.count, (b',', b'[', b'{')))
    weight = width * len(content) + 90 * values
    if weight > WEIGHT * limit:
        raise RpcError(f'the answer would take {show_size(weight)} of memory: more than {WEIGHT} '
                       'times the limit (rpc_limit)')
    return content.decode('utf-8', 'replace')


# XML-RPC. Requests are our own since xmlrpc.client takes 6 MiB and 14 ms to import; answers since
# expat, below it, fails over control characters and bytes that are not UTF-8, which rTorrent
# passes on from torrents, and takes three times as long.

# Text with these goes as base64, which rTorrent takes for any text: older ones refuse emoji and
# control characters, no XML carries \r or bytes that are not UTF-8.
ODD_TEXT = re.compile('[\0-\x08\x0b-\x1f\ud800-\U0010ffff]')


def xml_escape(text):
    """Return text as character data."""
    return str(text).replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')


def xml_value(value):
    """Return a value as a <value> that older rTorrents take, too."""
    # An xmlrpc.client.Binary holds its bytes there
    value = getattr(value, 'data', value)
    if isinstance(value, str) and ODD_TEXT.search(value):
        value = value.encode('utf-8', 'surrogateescape')
    # rTorrent takes text for numbers
    if isinstance(value, int) and not -1 << 31 <= value < 1 << 31:
        value = str(value)
    if isinstance(value, str):
        inner = f'<string>{xml_escape(value)}</string>'
    # Older ones refuse <boolean>
    elif isinstance(value, int):
        inner = f'<i8>{value:d}</i8>'
    elif isinstance(value, (bytes, bytearray)):
        inner = f'<base64>{binascii.b2a_base64(value).decode()}</base64>'
    elif isinstance(value, (list, tuple)):
        inner = f"<array><data>{''.join(map(xml_value, value))}</data></array>"
    elif isinstance(value, dict):
        members = [f'<member><name>{xml_escape(name)}</name>{xml_value(item)}</member>'
                   for name, item in value.items()]
        inner = f"<struct>{''.join(members)}</struct>"
    else:
        raise TypeError(f'{quoted(value)} cannot be sent to rTorrent; allowed are text, whole '
                         'numbers, bytes, lists and dicts')
    return f'<value>{inner}</value>'


def xml_call(method, *params) -> bytes:
    """Return one methodCall."""
    inner = ''.join([f'<param>{xml_value(param)}</param>' for param in params])
    return (f'<?xml version="1.0"?><methodCall><methodName>{xml_escape(method)}</methodName>'
            f'<params>{inner}</params></methodCall>').encode()


def xml_batch(calls) -> bytes:
    """Return one methodCall for many calls."""
    entries = [{'methodName': method, 'params': params} for method, *params in calls]
    return xml_call('system.multicall', entries)


# An answer becomes JSON text by replacing its tags, in this order, so that the C code of `bytes`
# and `json` does all the work, and JSON's grammar finds what does not fit together:
#
#     <value><array><data>\r\n<value><i8>7</i8></value>\r\n</data></array></value>
#     [\r\n7\0\r\n]\0                         tags replaced; \0, which no XML holds, ends a value
#     [\n7],                                  \0 is a comma, but for the last value of a list
XML_AS_JSON = {
    b'\\': b'\\\\',
    b'"': b'\\"',
    # What makes up most of a list comes first: the rest has less to look through
    b'<value><string>': b'"',
    b'</string></value>': b'"\0',
    b'<value><i8>': b'',
    b'</i8></value>': b'\0',
    b'<value><array><data>': b'[',
    b'</data></array></value>': b']\0',
    b'<param>': b'',
    b'</param>': b'',
    b'<value><string/></value>': b'""\0',
    b'<value><i4>': b'',
    b'</i4></value>': b'\0',
    b'<value><int>': b'',
    b'</int></value>': b'\0',
    b'<value><ex:i8>': b'',
    b'</ex:i8></value>': b'\0',
    b'<value><boolean>0</boolean></value>': b'false\0',
    b'<value><boolean>1</boolean></value>': b'true\0',
    b'<value><array><data/></array></value>': b'[]\0',
    b'<value><struct>': b'{',
    b'</struct></value>': b'}\0',
    b'<value><struct/></value>': b'{}\0',
    b'<member>': b'',
    b'</member>': b'',
    b'<name>': b'"',
    b'</name>': b'":',
    # Line ends are as XML has them
    b'\r\n': b'\n',
    b'\r': b'\n',
    b'\0]': b']',
    b'\0\n]': b']',
    b'\0}': b'}',
    b'\0\n}': b'}',
    b'\0\n\n}': b'}',
    b'\0': b',',
    b'&lt;': b'<',
    b'&gt;': b'>',
    b'&quot;': b'\\"',
    b'&apos;': b"'",
    b'&amp;': b'&'}
XML_ANSWER = re.compile(rb'(?s)\s{0,9}(?:<\?xml[^>]{0,99}\?>)?\s{0,9}<methodResponse>\s{0,9}'
                        rb'<(params|fault)>(.*)</\1>\s{0,9}</methodResponse>\s{0,9}')


def xml_from_base64(found):
    """Return a base64 element as text: rTorrent sends so what is not UTF-8."""
    text = binascii.a2b_base64(found[1]).decode('utf-8', 'replace')
    return b'<string>%s</string>' % xml_escape(text).encode()


def xml_as_json(inner) -> bytes:
    """Return JSON text for what stands in an answer."""
    if b'<base64>' in inner:
        inner = re.sub(b'<base64>([^<]*)</base64>', xml_from_base64, inner)
    inner = inner.replace(b'\0', b'?')
    for tag, mark in XML_AS_JSON.items():
        # To look for one byte costs next to nothing
        if tag[:1] in inner:
            inner = inner.replace(tag, mark)
    return inner.strip(b'\n,')


def xml_reply(content, limit=RPC_LIMIT):
    """Return the value in the body of an answer; raises RpcError for a fault or a non-answer."""
    answer = XML_ANSWER.fullmatch(content)
    try:
        if not answer:
            raise ValueError
        value = json.loads(json_text(xml_as_json(answer[2]), limit), strict=False)
    except (ValueError, RecursionError):
        raise Unreachable('the answer is not XML-RPC as rTorrent writes it: '
                          + beginning(content)) from None
    if answer[1] == b'fault':
        raise rpc_fault(value)
    return value


# JSON-RPC is answered by 0.15 and later. It is 15 times faster to read and carries every
# character, but a single name that is not UTF-8 turns a whole answer into an error.

def json_batch(calls) -> bytes:
    """Return one request for many calls; their ids count from 0."""
    return json.dumps([{'jsonrpc': '2.0', 'id': number, 'method': method, 'params': params}
                       for number, (method, *params) in enumerate(calls)]).encode()


def batch_answers(entries, count):
    """Return the answers to `count` calls, an RpcError in the place of each that failed.

    By XML an entry is [answer] or a fault, by JSON {'result': answer} or {'error': fault}.
    """
    if not isinstance(entries, list) or len(entries) != count:
        raise RpcError('not every call was answered')
    answers = []
    for entry in entries:
        if isinstance(entry, list) and entry:
            answers.append(entry[0])
        elif isinstance(entry, dict) and 'result' in entry:
            answers.append(entry['result'])
        else:
            answers.append(rpc_fault(entry))
    return answers


# rTorrent 0.9.8 aborts over a command on files without the file's index, be it called, among the
# fields of a list, or one of the commands that others run. The latter may hold names of torrents:
# they are no commands unless they begin so.
FILE_COMMAND = re.compile(r'(?:^|\$) {0,9}f\.(?!multicall)[a-z]')
RUNS_COMMANDS = re.compile(r'load\.|branch$|[dtp]\.multicall')


def refuse_deadly(method, params):
    """Refuse f.x(HASH), which needs a target HASH:fINDEX, in any disguise."""
    if method == 'system.multicall':
        for entry in params[0]:
            refuse_deadly(entry['methodName'], entry['params'])
    deadly = False
    if FILE_COMMAND.match(method):
        deadly = ':f' not in str(params[:1])
    elif RUNS_COMMANDS.match(method):
        deadly = any(FILE_COMMAND.search(param) for param in params if isinstance(param, str))
    if deadly:
        raise RpcError(f'{method} needs a target HASH:fINDEX; without it rTorrent would abort')


class Transport:
    """Carries the calls of an xmlrpc.client.ServerProxy; `carry` makes a value of a request."""

    def __init__(self, carry: Callable[[bytes], Any]):
        self.carry = carry

    def request(self, host, handler, body, verbose=False):
        """Return what a call answers; host and handler mean nothing here."""
        return self.carry(body)

    def close(self):
        """Do nothing: there is a connection for each call."""


# --- Engine ----------------------------------------------------------------------------------
# A URL, or rTorrent's own configuration file (the rc), becomes an Engine: one rTorrent, with two
# doors. ask() and tell() are for the built-in jobs, open() for jobs that people write. Before the
# first question, and again after a restart, it looks what this rTorrent is and offers. It says in
# the log, once, when its rTorrent is gone and when it is back. Any thread may use it.

VIEWS = ('default main started stopped complete incomplete seeding leeching active '
         'messages').split()
# Stats field -> rTorrent command
GAUGES = {
    'up_rate': 'throttle.global_up.rate',
    'up_limit': 'throttle.global_up.max_rate',
    'up_total': 'throttle.global_up.total',
    'down_rate': 'throttle.global_down.rate',
    'down_limit': 'throttle.global_down.max_rate',
    'down_total': 'throttle.global_down.total',
    'open_sockets': 'network.open_sockets',
    'max_open_sockets': 'network.max_open_sockets',
    'open_files': 'network.open_files',
    'max_open_files': 'network.max_open_files'}
# What is asked of an rTorrent first -> what to take where it does not tell
ABOUT = {
    'system.listMethods': [],
    'view.list': [],
    'session.name': '',
    'session.path': '',
    'system.cwd': '',
    'system.client_version': '?',
    'system.library_version': '?',
    'system.pid': 0,
    'startup_time': 0,
    'network.rpc.use_jsonrpc': 0}
RC_FILES = ['$XDG_CONFIG_HOME/rtorrent/rtorrent.rc', '~/.config/rtorrent/rtorrent.rc',
            '~/.rtorrent.rc']
# Other names of commands of an rc
RC_NAMES = {
    'scgi_local': 'network.scgi.open_local',
    'scgi_port': 'network.scgi.open_port',
    'session': 'session.path',
    'session.path.set': 'session.path'}
# A comment, or a command, which a semicolon ends, but in quotes
RC_COMMAND = re.compile(r'(?m)^[ \t]{0,99}#.*|(?:[^";\n]|"[^"\n]*"?)+')
RC_CALL = re.compile(r'\(\s{0,99}([\w.]{1,99})\s{0,99}(?:,([^()]*))?\)')
# Characters of an rc that are read
RC_LIMIT = 1 << 20


class Stats(NamedTuple):
    """The figures of an rTorrent; rates in bytes a second; None is what it does not tell."""
    engine_id: str
    version: str
    uptime: int | None                  # seconds
    up_rate: int | None
    up_limit: int | None                # 0 is none
    up_total: int | None
    down_rate: int | None
    down_limit: int | None
    down_total: int | None
    open_sockets: int | None
    max_open_sockets: int | None
    open_files: int | None
    max_open_files: int | None
    views: dict[str, int | None]        # of each of VIEWS, how many items it has
    rpc_time: float                     # seconds that rTorrent took to tell all this


def process_start(pid):
    """Return when a process of rTorrent was started here, in Unix seconds; 0 if not known."""
    with contextlib.suppress(OSError), open(f'/proc/{pid}/stat', 'rb') as stream:
        name, _, fields = stream.read().rpartition(b')')
        # Else the pid belongs to a container
        if b'(rtorrent' in name:
            # Ticks after boot at which it began: proc(5)
            ticks = int(fields.split()[19])
            return time.time() - elapsed_time() + ticks / os.sysconf('SC_CLK_TCK')
    return 0


def without_errors(answers):
    """Return the answers of Engine.ask() or tell(); raises the first RpcError among them."""
    for answer in answers:
        if isinstance(answer, RpcError):
            raise answer
    return answers


class Engine:
    """One rTorrent; every method raises RpcError when it does not answer as it should.

    What it is and offers is in the attributes once ask(), tell() or reach() was called.
    aliases: of trackers, name -> beginnings of their URLs.
    """
    gone_since: float | None = None     # in elapsed time
    # For which socket file, or minute, the following was asked
    stamp: Any = None
    methods: frozenset = frozenset()
    views: frozenset = frozenset()
    engine_id = session_path = cwd = version = ''
    startup = 0.0                       # Unix seconds, 0 where that is not known
    speaks_json = False

    def __init__(self, url: str, timeout: float = RPC_TIMEOUT, limit: int = RPC_LIMIT,
                 aliases: dict | None = None, same_files: bool = False):
        self.address = parse_address(url)
        # Its paths mean our files, whatever can be proven of that
        self.same_files = same_files
        self.timeout = timeout
        self.limit = limit
        self.aliases = aliases or {}
        self.log = logging.getLogger('torque.engine')
        # What is worth a line of the log only once
        self.said: set[str] = set()

    @property
    def is_away(self) -> bool:
        """Tell whether rTorrent did not answer when it was asked last."""
        return self.gone_since is not None

    def open(self):
        """Return an xmlrpc.client.ServerProxy for this rTorrent: engine.open().d.name(HASH)."""
        import xmlrpc.client
        engine = self

        class Proxy(xmlrpc.client.ServerProxy):
            # What every call of a ServerProxy goes through is its private __request; this one
            # writes what older rTorrents take, too.
            def _ServerProxy__request(self, method, params):
                engine.reach()
                with engine.exchange([(method, *params)]):
                    return self('transport').request('', '', xml_call(method, *params))

        transport: Any = Transport(self.carry)
        # A placeholder: nothing is sent there
        return Proxy('http://rtorrent/RPC2', transport)

    def ask(self, calls: Iterable[tuple]) -> list:
        """Return the answers to many questions, (method, *params) each, in one round trip.

        In the place of one that failed is its RpcError. Questions only: they may be sent twice.
        """
        self.reach()
        if self.speaks_json:
            return self.in_parts(calls, self.by_json)
        return self.in_parts(calls, self.by_xml)

    def tell(self, calls: Iterable[tuple]) -> list:
        """Return the answers to commands, as ask() does; these are never sent twice."""
        self.reach()
        return self.in_parts(calls, self.by_xml)

    def in_parts(self, calls, get):
        """Return the answers to calls, of which each request takes BATCH."""
        calls = list(calls)
        answers: list = []
        for start in range(0, len(calls), BATCH):
            part = calls[start:start + BATCH]
            with self.exchange(part):
                answers += get(part)
        for number, answer in enumerate(answers):
            if isinstance(answer, RpcError):
                answers[number] = self.failed(answer, calls[number][0])
        return answers

    def by_json(self, calls):
        """Return the answers to questions, asked by XML where JSON cannot carry them."""
        try:
            text = json_text(self.send(json_batch(calls), 'application/json'), self.limit)
            return batch_answers(json.loads(text), len(calls))
        except Unreachable:
            raise
        except (RpcError, TypeError, ValueError, RecursionError):
            return self.by_xml(calls)

    def by_xml(self, calls):
        """Return the answers to calls that go out together, by XML."""
        return batch_answers(self.carry(xml_batch(calls)), len(calls))

    def carry(self, body):
        """Return the answer to one methodCall."""
        return xml_reply(self.send(body, 'text/xml'), self.limit)

    def send(self, body, content_type) -> bytes | bytearray:
        """Carry a request to rTorrent and the body of the answer back."""
        request = scgi_request
        if self.address.kind == 'http':
            request = http_request
        try:
            return request(self.address, body, content_type, self.timeout, self.limit)
        except NoAnswer as error:
            raise Unreachable(f'{error}; {KINDS_OF_PORT}') from None

    @contextlib.contextmanager
    def exchange(self, calls):
        """Let what fails in here say where and in which call; log that rTorrent goes or is back.

        An error that says so counts as told. Deadly calls are refused.
        """
        method = calls[0][0]
        try:
            for name, *params in calls:
                refuse_deadly(name, params)
            yield
        except Unreachable as error:
            named = self.failed(error, method)
            named.told = True
            if self.gone_since is None:
                self.gone_since = elapsed_time()
                self.log.warning('%s', named)
            raise named from None
        except RpcError as error:
            raise self.failed(error, method) from None
        since, self.gone_since = self.gone_since, None
        if since is not None:
            self.log.info('%s answers again, after %s', self.address.where,
                          show_duration(elapsed_time() - since))

    def failed(self, error, method):
        """Return the error that says where and which call failed."""
        if isinstance(error, Unreachable) or error.code in MISSING:
            # It may have been restarted or upgraded
            self.stamp = None
        where = self.address.where
        # Whoever reads this has not asked for the list of methods
        if method != 'system.listMethods':
            where += f': {method}'
        return type(error)(f'{where}: {error}', error.code)

    def reach(self):
        """Ask what rTorrent is and offers, unless that is known; RpcError if it is away."""
        # A restarted rTorrent makes a new socket file; a port is looked at once a minute
        stamp = elapsed_time() // 60
        with contextlib.suppress(OSError):
            found = os.stat(self.address.path)
            stamp = found.st_ino, found.st_ctime_ns
        if stamp != self.stamp:
            self.look()
            self.stamp = stamp

    def look(self):
        """Ask rTorrent who it is and what it offers."""
        answers = self.in_parts([(command,) for command in ABOUT], self.by_xml)
        without_errors(answers[:1])
        found = [typed(answer, default) for answer, default in zip(answers, ABOUT.values())]
        (methods, views, self.engine_id, self.session_path, self.cwd, client, library, pid,
         self.startup, by_json) = found
        self.methods = frozenset(map(str, methods))
        self.views = frozenset(map(str, views))
        self.version = f'{client}/{library}'
        if not self.startup and self.address.is_local():
            self.startup = process_start(pid)
        self.speaks_json = by_json == 1

    def say_once(self, text):
        """Log a warning about this rTorrent, if it has not been said yet."""
        if text not in self.said:
            self.said.add(text)
            self.log.warning('%s: %s', self.address.where, text)

    def has_view(self, view: str) -> bool:
        """Tell whether this rTorrent had a view when it was looked at."""
        self.reach()
        return view in self.views

    def stats(self) -> Stats:
        """Return rTorrent's figures, asked in one round trip."""
        self.reach()
        calls: dict[str, tuple] = {}
        for name, command in GAUGES.items():
            if command in self.methods:
                calls[name] = command, ''
        for view in VIEWS:
            calls[view] = 'view.size', '', view
        began = time.perf_counter()
        answers = self.ask(calls.values())
        rpc_time = time.perf_counter() - began
        told = {name: answer for name, answer in zip(calls, answers) if isinstance(answer, int)}
        uptime = None
        if self.startup:
            uptime = int(time.time() - self.startup)
        return Stats(
            engine_id=self.engine_id,
            version=self.version,
            uptime=uptime,
            views={view: told.get(view) for view in VIEWS},
            rpc_time=rpc_time,
            **{name: told.get(name) for name in GAUGES})


def expanded(names):
    """Return paths, variables and ~ expanded, without those whose variable is not set."""
    paths = [os.path.expanduser(os.path.expandvars(name)) for name in names]
    return [path for path in paths if not path.startswith('$')]


def first_file(names):
    """Return the path of the first file that exists; '' for none."""
    for path in expanded(names):
        if os.path.isfile(path):
            return path
    return ''


def rc_value(value, settings):
    """Return what an rc's value comes to: (command,args) are worked out from the inside.

    What torque cannot work out is left.
    """
    # A name may stand for itself
    for _ in range(100):
        call = RC_CALL.search(value)
        if not call or not value.startswith('('):
            break
        name, rest = call.groups('')
        args = [arg.strip() for arg in rest.split(',')]
        if name == 'cat':
            found = ''.join(args)
        elif name == 'system.env':
            found = os.environ.get(args[0], '')
        elif name in settings:
            found = settings[name][0]
            # rTorrent's own ends so
            if name == 'session.path':
                found += '/'
        else:
            break
        value = value[:call.start()] + found + value[call.end():]
    return value


def read_rc(path, settings: dict[str, tuple[str, str]], seen: set):
    """Add the commands of an rc and of the files it imports to settings; later ones win.

    settings: values, and where they stand, by name. seen: the files that are read, none of which
    is read again: one may import itself.
    """
    path = os.path.normpath(os.path.expanduser(path))
    if path in seen:
        return
    seen.add(path)
    try:
        with open(path, encoding='utf-8', errors='replace') as stream:
            # A line that goes on below still counts as one
            text = stream.read(RC_LIMIT).replace('\\\n', '\r')
    # Its name may hold a NUL
    except (OSError, ValueError) as error:
        why = getattr(error, 'strerror', error)
        raise UserError(f'{one_line(path)}: {why}; set scgi_url in [TORQUE]') from None
    for command in RC_COMMAND.finditer(text):
        key, _, value = command[0].replace('"', '').partition('=')
        key, value = key.strip(), value.strip()
        line = 1 + len(re.findall('[\n\r]', text[:command.start()]))
        place = f'{path}:{line}'
        if key in ('import', 'try_import'):
            try:
                target = os.path.expanduser(rc_value(value, settings))
                read_rc(os.path.join(os.path.dirname(path), target), settings, seen)
            except UserError as error:
                if key == 'import':
                    raise UserError(f'{place}: {error}') from None
        elif key == 'method.insert':
            key, _, rest = value.partition(',')
            settings[key.strip()] = rest.partition(',')[2].strip(), place
        else:
            settings[RC_NAMES.get(key, key)] = value, place


def find_url(rc_file):
    """Return the scgi_url that rTorrent's own configuration gives.

    rc_file None: the first of RC_FILES that exists. Raises UserError naming what was read.
    """
    names = RC_FILES
    if rc_file:
        names = [rc_file]
    path = first_file(names)
    if not path:
        raise UserError('is not set in [TORQUE], and there is no '
                        f"{' or '.join(expanded(names))} (rtorrent_rc) to take it from; "
                        '-D scgi_url=ADDRESS sets it for once')
    settings = {'fs.homedir': (os.path.expanduser('~'), '')}
    read_rc(path, settings, set())
    value, place = settings.get('network.scgi.open_local',
                                settings.get('network.scgi.open_port', ('', '')))
    if not value:
        example = '(cat,(session.path),rpc.socket)'
        if 'session.path' not in settings:
            example = os.path.expanduser('~/rpc.socket')
        raise UserError(f'{path} opens no SCGI socket; set scgi_url in [TORQUE], or write there, '
                        f'and start rTorrent anew: network.scgi.open_local = {example}')
    url = 'scgi://' + rc_value(value, settings).replace('//', '/')
    try:
        parse_address(url)
    except UserError:
        raise UserError(f'{place}: torque cannot tell what {quoted(value)} comes to; write the '
                        'whole path of the socket there, or set scgi_url in [TORQUE]') from None
    return url


# --- Files -----------------------------------------------------------------------------------
# A path enters, a fact about the disk leaves. What a path leads to is known by its identity,
# (st_dev, st_ino): bind mounts, links and letters of another case do not change that, while the
# path itself is only a text. Files are written and copied whole or not at all. No threads.

Identity = Tuple[int, int]              # st_dev, st_ino
# By these a system says that there is no such file, whatever else may be wrong.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
COPIED_AT_ONCE = 1 << 20                # bytes
# Some rTorrents show these for other characters: ? for any byte, %XX, a line feed for \r.
DOUBTFUL = re.compile('[?\ufffd\n]|%[0-9A-Fa-f]{2}')


def identity(path) -> Identity | None:
    """Return the identity of what a path leads to, None where nothing is there.

    Raises OSError where that cannot be told, as in a folder that may not be read.
    """
    try:
        status = os.stat(path)
    # A NUL in it: no file has such a name
    except ValueError:
        return None
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
    return status.st_dev, status.st_ino


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path):
    """Make one line of what the system refuses inside, with a file of torque's own."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{path} cannot be used: {error.strerror}; state_dir and pid_file in '
                        '[TORQUE] say where it is') from None


def open_own(path, flags):
    """Open a private file, but no link; its folder is made if need be. An `opener` of open()."""
    if flags & os.O_CREAT:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def replace_file(path, text):
    """Write a private file whole or not at all, whatever happens meanwhile."""
    with writing(path):
        new = path + '.new'
        with open(new, 'w', encoding='utf-8', opener=open_own) as stream:
            stream.write(text)
        sync(new)
        os.replace(new, path)
        sync(os.path.dirname(path))


def existing(path):
    """Return a path if something is there, else the folder above it that exists."""
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def disk_of(path) -> tuple[int | None, int | None]:
    """Return the device that holds a path, or would, and its free bytes; None: not known."""
    path = existing(path)
    try:
        disk = os.statvfs(path)
        return os.stat(path).st_dev, disk.f_bavail * disk.f_frsize
    except (OSError, ValueError):
        return None, None


def same_content(path, other):
    """Tell whether two regular files hold the same bytes; links are no regular files."""
    for name in (path, other):
        if os.path.islink(name) or not os.path.isfile(name):
            return False
    if identity(path) == identity(other):
        return True
    with open(path, 'rb') as one, open(other, 'rb') as two:
        if os.fstat(one.fileno()).st_size != os.fstat(two.fileno()).st_size:
            return False
        while True:
            content = one.read(COPIED_AT_ONCE)
            if content != two.read(COPIED_AT_ONCE):
                return False
            if not content:
                return True


def give_owner(path, status: os.stat_result):
    """Give a file or folder the owner of another, and tell whether it has that one now."""
    with contextlib.suppress(OSError):
        os.chown(path, status.st_uid, status.st_gid)
    return os.stat(path).st_uid == status.st_uid


def copy_file(path, copy):
    """Make a new file with content, holes, times, mode and owner of another, on the disk."""
    import shutil
    with open(path, 'rb') as source, open(copy, 'xb') as target:
        size, at = os.fstat(source.fileno()).st_size, 0
        target.truncate(size)
        while at < size:
            try:
                at = os.lseek(source.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                # Only a hole is left
                break
            end = os.lseek(source.fileno(), at, os.SEEK_HOLE)
            while at < end:
                content = os.pread(source.fileno(), min(end - at, COPIED_AT_ONCE), at)
                if not content:
                    raise LoggableError(f'{quoted(path)} became shorter while it was copied')
                at += os.pwrite(target.fileno(), content, at)
    if not give_owner(copy, os.stat(path)):
        raise LoggableError(f'{quoted(copy)} cannot be given to the owner of {quoted(path)}')
    # Not every file system has modes
    with contextlib.suppress(OSError):
        shutil.copystat(path, copy)
    sync(copy)


def make_folders(folder):
    """Make a folder and those above it; new ones belong to the owner of the one they lie in."""
    parent = os.path.dirname(folder)
    if not os.path.isdir(folder):
        make_folders(parent)
        os.mkdir(folder)
        give_owner(folder, os.stat(parent))


def discard(folder):
    """Delete a folder of torque's own and all in it."""
    import shutil
    shutil.rmtree(folder, ignore_errors=True)


def rename_new(path, new):
    """Give a file or folder another name that nothing has; OSError where something has it."""
    if os.path.isfile(path):
        # Where there are hard links, nothing can go wrong
        with contextlib.suppress(OSError):
            os.link(path, new)
            os.unlink(path)
    if os.path.lexists(path):
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, 'exists: nothing is overwritten', new)
        os.rename(path, new)
    sync(os.path.dirname(new))


def lock(file, patience):
    """Lock an open file; tell whether no other thread or process has kept it so long."""
    import fcntl
    end = time.monotonic() + patience
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.01)


def require_place(folder):
    """Raise UserError where files cannot be written and locked in a folder, which may be made."""
    path = os.path.join(existing(folder), f'.torque-{os.getpid()}')
    with writing(folder), open(path, 'x', opener=open_own) as stream:
        os.remove(path)
        lock(stream, 0)


@contextlib.contextmanager
def locked(path, patience):
    """Hold a lock that no other thread or process has; LoggableError where one keeps it."""
    with writing(path):
        stream = open(path, 'w', encoding='utf-8', opener=open_own)
    with stream:
        with writing(path):
            free = lock(stream, patience)
        if not free:
            raise LoggableError('another run deletes or moves something just now')
        yield


def listener(sock) -> tuple[int, int]:
    """Return pid and user of who called listen() at the other end of a Unix socket."""
    # The kernel says so, as pid, uid, gid: struct ucred, unix(7).
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return struct.unpack('3i', credentials)[:2]


def rtorrent_process(engine) -> int | None:
    """Return the pid of an rTorrent that runs on this machine; None where that is not known.

    Behind a port, the lock in its session folder has to name this host and that process.
    """
    with contextlib.suppress(OSError, ValueError):
        if engine.address.kind == 'unix':
            with connect(engine.address, 5) as sock:
                pid, _ = listener(sock)
        elif engine.address.is_local():
            pid, session, cwd = without_errors(engine.ask(
                [('system.pid', ''), ('session.path', ''), ('system.cwd', '')]))
            lock_file = os.path.join(cwd, session, 'rtorrent.lock')
            with open(lock_file, encoding='utf-8') as stream:
                if stream.read(300).strip() != f'{socket.gethostname()}:+{pid}':
                    return None
        else:
            return None
        with open(f'/proc/{pid}/comm', encoding='utf-8', errors='replace') as stream:
            if stream.read().startswith('rtorrent'):
                return pid
    return None


def has_our_mounts(pid):
    """Tell whether a process sees the same mounts as this one, from the same root."""
    # Something may be mounted between the two looks, but not every time.
    with contextlib.suppress(OSError):
        for _ in range(3):
            with open(f'/proc/{pid}/mountinfo', 'rb') as theirs, \
                    open('/proc/self/mountinfo', 'rb') as ours:
                if theirs.read() == ours.read():
                    return True
    return False


def why_unseen(engine):
    """Return why the paths of an rTorrent may not mean our files; '' where they do."""
    if engine.same_files:
        return ''
    pid = rtorrent_process(engine)
    if not pid:
        return 'it is not known to run on this machine'
    if not has_our_mounts(pid):
        return 'it sees other mounts than torque, as in a container'
    return ''


def sees_same_files(engine):
    """Tell whether the paths of an rTorrent mean our files; where not, the log has why, once."""
    why = why_unseen(engine)
    if why:
        engine.say_once(f'where its data lies is not known: {why}; where its paths are those of '
                        'torque, set same_files = yes')
    return not why


def require_same_files(engine):
    """Raise LoggableError where the paths of an rTorrent may not mean our files."""
    why = why_unseen(engine)
    if why:
        raise HeldBack(f'the files of rTorrent at {engine.address.where} may not be those of '
                       f'torque: {why}; where you know that they are, set same_files = yes')


# --- Fields and Filter -----------------------------------------------------------------------
# A field is what conditions, templates and jobs know of a torrent: its kind, the raw values that
# it needs, and what makes its value of them. A raw value is what a d. command answers, something
# of the run or of the engine (now, aliases, session, cwd, seen, own_session), or the rows of a
# second question ("files", "trackers"), which is asked only for torrents that the cheap
# conditions have left over. A row is a mapping of field name to value. The text of a condition
# enters, a Filter leaves: closures over a row and `now` in Unix seconds. What is not known is
# None and meets neither a condition nor its opposite, so NOT is carried down to the single
# conditions. Pure functions, for any thread, but for the fields that need `seen` or
# `own_session`: they look at the disk.

SOURCES = {                             # second questions: command, and the columns of its rows
    'files': 'f.multicall f.path= f.size_bytes=',
    'trackers': 't.multicall t.url= t.is_enabled= t.scrape_complete= t.scrape_incomplete= '
                't.failed_time_last= t.success_time_last= t.scrape_time_last='}
TV = re.compile(
    r'^(?P<show>.+?)[._ -]+'
    r'(?:S(?P<season>\d{1,2})(?:E(?P<episode>\d{2,3}))?|\d{1,2}x\d{2}|'
    r'(?P<date>\d{4}[._-]\d{2}[._-]\d{2}))'
    r'(?:[._ -]+(?P<title>.*?))??'
    r'(?:[._ -]+(?:\d{3,4}[pi]|[HP]DTV|WEB-?(?:DL|Rip)|BluRay|BDRip|DVDRip|[XH]\.?26[45])\b.*)?$',
    # The title may hold anything: where it could not go on to the end, cubic time was lost
    re.I | re.S)
MOVIE = re.compile(
    r'^(?P<title>.+?)[._ -]+[\[(]?(?P<year>(?:19|20)\d\d)[\])]?(?:[._ -].*)?$')
# What tv and movies may have at the end of their names, too
RELEASE = {
    'codec': re.compile(r'[._ -]([xh]\.?26[45]|hevc|avc|av1|xvid)\b', re.I),
    'group': re.compile(r'-(?!(?:E?\d+|DL)$)(\w+)$')}
TRAITS = {
    'audio': 'flac mp3 ogg opus m4a wav dts ac3 alac wma ape',
    'video': 'avi mkv m4v vob mp4 mpg mpeg m2ts ts ogv wmv webm mov',
    'img': 'jpg jpeg png gif tif bmp svg webp',
    'docs': 'chm pdf cbr cbz odt ods doc docx xls xlsx ppt epub mobi azw3 djvu',
    'misc': 'rar zip tgz gz bz2 xz 7z iso bin'}
# Unix seconds, 1973: what is less has lost its unit, or is of a clock that was not set yet
EARLIEST = 10 ** 8
ACTIVATION = re.compile(r'R([0-9]{1,15})[^RP]*(?:P([0-9]{1,15})|$)')
TRACKER_HOST = re.compile(r'(?:\w{1,9}://)?(?:[^/@]*@)?(\[[^]/]*\]|[^/:]*)')
# co and the like are part of a country's domain, as in example.co.uk
DOMAIN = re.compile(
    r'[^.]{1,63}\.(?:(?:co|com|net|org|ac|gov|edu)\.[a-z]{2}|[^.]{0,62}[a-z])\Z')


class TorrentField(NamedTuple):
    """A field: the kind that conditions see, and how its value comes from the raw ones."""
    # text path bool number size time duration tags files; custom and any may be one or another
    kind: str
    needs: tuple                        # raw values
    value: Callable | None = None       # a function of them in this order; None: the one itself


def data_path(cwd, base, directory, name, multi, is_open):
    """Return where the data is; the base path of what is not open is old, or empty."""
    if not directory or is_open and base:
        place = base
    elif multi:
        place = directory
    else:
        place = os.path.join(directory, name)
    return place and os.path.join(cwd, place)


# The functions of fields take raw values as rTorrent gives them.

def first_time(*values):
    """Return the first of times that is known; 0 where none is."""
    for value in values:
        # That of ruTorrent ends in a line feed
        text = str(value).strip()
        if text.isdecimal() and len(text) < 19 and int(text) >= EARLIEST:
            return int(text)
    return 0


def seconds_active(marks, start, end):
    """Return the seconds between R(esumed) and P(aused) marks that lie within a window.

    None where pyrocore has left no marks.
    """
    spans = ACTIVATION.findall(marks)
    if not spans:
        return None
    seconds = 0.0
    for resumed, paused in spans:
        stop = min(float(paused or end), end)
        seconds += max(0.0, stop - max(float(resumed), start))
    return seconds


def seed_time(marks, tm_completed, finished, complete, active, now):
    """Return for how long a complete item was seeded; None where that is not known."""
    completed = first_time(tm_completed, finished)
    if not complete or not completed:
        return None
    seconds = seconds_active(marks, completed, now)
    if seconds is None and active:
        return now - completed
    return seconds


def leech_time(marks, tm_started, began, tm_completed, finished, now):
    """Return for how long an item was downloaded; None where that is not known."""
    started = first_time(tm_started, began)
    end = first_time(tm_completed, finished) or now
    seconds = seconds_active(marks, 0, end)
    if seconds is None and started:
        return max(end - started, 0)
    return seconds


def time_stopped(marks, state, changed, tm_started, began):
    """Return when an item was stopped: by its last mark, else by rTorrent, if it ever ran."""
    _, _, last = marks.rpartition('P')
    paused = first_time(last.partition('R')[0])
    if paused or state or not first_time(tm_started, began):
        return paused
    return first_time(changed)


def last_time(now, noted, *signs):
    """Return when there last were signs of life, such as peers or a rate."""
    if any(signs):
        return int(now)
    return first_time(noted)


def session_file(folder, info_hash):
    """Return the path of the metafile in rTorrent's session folder; nothing without one."""
    return folder and f'{folder}{info_hash}.torrent'


def time_loaded(noted, added, began, folder, info_hash):
    """Return when an item was loaded, as torque or ruTorrent has noted it.

    Else rTorrent's last start, or when its metafile in the session folder was written, which
    happens again when all of an item is saved: the older is nearer to the truth.
    """
    times = [began]
    with contextlib.suppress(OSError, ValueError):
        times.append(int(os.stat(session_file(folder, info_hash)).st_mtime))
    return first_time(noted, added, *sorted(times))


def percent_done(completed, size):
    """Return how much of an item is there."""
    if not size:
        return 0.0
    return 100.0 * completed / size


def true_ratio(thousandths):
    """Return uploaded by size."""
    return thousandths / 1000


def tags_of(text):
    """Return the tags that an item has."""
    return text.lower().split()


def decoded_label(text):
    """Return a label, which ruTorrent stores as a URL has it, as it is meant."""
    from urllib.parse import unquote
    with contextlib.suppress(UnicodeDecodeError):
        text = unquote(text, errors='strict')
    return text


def tracker_alias(url, aliases: dict[str, list[str]]):
    """Return a tracker's name by [ANNOUNCE], else the domain that its host belongs to.

    >>> tracker_alias('https://tracker.example.co.uk:80/x/announce', {})
    'example.co.uk'
    """
    for alias, beginnings in aliases.items():
        if url.startswith(tuple(beginnings)):
            return alias
    server = '/'.join(url.split('/', 3)[:3]) + '/'
    host = TRACKER_HOST.match(url)[1].lower()           # type: ignore[index]
    for alias, beginnings in aliases.items():
        for part in beginnings:
            # the same server with another passkey, or a host of this domain
            if (part + '/').startswith(server) or f'.{host}'.endswith(f'.{part.lower()}'):
                return alias
    domain = DOMAIN.search(host)
    if domain:
        return domain[0]
    return host


def first_tracker(rows):
    """Return the first enabled announce URL; None where all are disabled, '' without any."""
    trackers = [(url, enabled) for url, enabled, *_ in rows if url != 'dht://']
    for url, enabled in trackers:
        if enabled:
            return url
    if trackers:
        return None
    return ''


def alias_of(rows, aliases):
    """Return the name of the first enabled tracker; None where all are disabled."""
    url = first_tracker(rows)
    return url and tracker_alias(url, aliases)


def most(column, rows):
    """Return what the tracker says that knows of most peers; None before any has told.

    rTorrent notes a scrape also where an announce was answered with these numbers, which DHT and
    some trackers leave out.
    """
    return max([row[column] for row in rows if row[-1]], default=None)


def trackers_failed(rows):
    """Return how many enabled trackers have failed since they last answered."""
    return len([url for url, enabled, _, _, failed, answered, _ in rows
                if enabled and failed > answered])


def file_names(rows):
    """Return the paths of an item's files."""
    return [path for path, _ in rows]


def kind_of(text):
    """Return an extension, or what a condition says of one, as kinds are spelt.

    >>> kind_of('jpeg'), kind_of(':mpeg'), kind_of('r07'), kind_of('jpegxl')
    ('jpg', ':mpg', 'rar', 'jpegxl')
    """
    text = re.sub('^(:?[jm]p)eg$', r'\1g', text, flags=re.I)
    return re.sub('^(:?)r[0-9]{2,3}$', r'\1rar', text, flags=re.I)


def file_kinds(rows, percent=0):
    """Return the kinds of files that make up at least so many percent of the data."""
    sizes: dict = collections.Counter()
    for path, size in rows:
        _, ending = os.path.splitext(path)
        sizes[kind_of(ending.lstrip('.').lower())] += size
    least = percent * sum(sizes.values())
    return sorted(kind for kind, size in sizes.items() if kind and 100 * size >= least)


def name_traits(name, kind) -> dict[str, str]:
    """Return what a name tells: kind (tv, movie, audio ...), show, season, title, group ..."""
    # The patterns are quadratic
    name = name[:255]
    if kind and name.endswith(kind):
        name = os.path.splitext(name)[0]
    sort = ''
    for trait, kinds in TRAITS.items():
        if kind in kinds.split():
            sort = trait
    if sort in ('', 'video', 'misc'):
        for trait, regex in (('tv', TV), ('movie', MOVIE)):
            match = regex.match(name)
            if match:
                traits = {'kind': trait, **match.groupdict('')}
                for key, last in RELEASE.items():
                    traits[key] = ''.join(last.findall(name)[-1:])
                return traits
    return {'kind': sort}


def guess_traits(name, rows):
    """Return a classification such as ['tv', 'mkv'], empty where nothing is recognised."""
    kind = ''.join(file_kinds(rows, 51))
    sort = name_traits(name, kind)['kind']
    if not sort:
        return []
    return [sort, kind or 'other']


def has_no_data(seen, *raw):
    """Tell whether an item has no data where it should be; None where that is not known.

    Not known is also what lies in a folder that is missing or empty: its disk may not be mounted.
    """
    path = data_path(*raw)
    with contextlib.suppress(OSError, ValueError):
        if seen and not DOUBTFUL.search(path) and os.listdir(os.path.dirname(path)):
            return not os.path.lexists(path)
    return None


def seen_path(seen, *raw):
    """Return where data is with all links resolved; None where that is not known."""
    path = data_path(*raw)
    if seen and not DOUBTFUL.search(path) and os.path.isdir(os.path.dirname(path)):
        return os.path.realpath(path)
    return None


def space_at(seen, *raw):
    """Return the free bytes on the disk that holds the data; None where that is not known."""
    path = seen_path(seen, *raw)
    if path is None:
        return None
    return disk_of(path)[1]


PATH = 'cwd d.base_path d.directory d.name d.is_multi_file d.is_open'
STARTED = 'd.custom=tm_started d.timestamp.started'
COMPLETED = 'd.custom=tm_completed d.timestamp.finished'
# Name, kind, and raw values, of which there is one where no function makes something of them
FIELD_TABLE = f"""\
hash             text      d.hash
name             text      d.name
message          text      d.message
directory        path      d.directory
path             path      {PATH}
realpath         path      seen {PATH}
is_ghost         bool      seen {PATH}
free             size      seen {PATH}
metafile         path      d.tied_to_file
sessionfile      path      session d.hash
throttle         text      d.throttle_name
label            text      d.custom1
tagged           tags      d.custom=tags
views            tags      d.views
size             size      d.size_bytes
uploaded         size      d.up.total
downloaded       size      d.down.total
left             size      d.left_bytes
up               size      d.up.rate
down             size      d.down.rate
xfer             size      d.up.rate d.down.rate
ratio            number    d.ratio
done             number    d.completed_bytes d.size_bytes
fno              number    d.size_files
prio             number    d.priority
peers            number    d.peers_connected
is_open          bool      d.is_open
is_active        bool      d.is_active
is_complete      bool      d.complete
is_ignored       bool      d.ignore_commands
is_private       bool      d.is_private
is_multi_file    bool      d.is_multi_file
is_hashing       bool      d.hashing
loaded           time      d.custom=tm_loaded d.custom=addtime d.load_date own_session d.hash
started          time      {STARTED}
completed        time      {COMPLETED}
stopped          time      d.custom=activations d.state d.state_changed {STARTED}
active           time      now d.custom=last_active d.peers_connected
last_xfer        time      now d.custom=last_xfer d.up.rate d.down.rate
leechtime        duration  d.custom=activations {STARTED} {COMPLETED} now
seedtime         duration  d.custom=activations {COMPLETED} d.complete d.is_active now
tracker          text      trackers
alias            text      trackers aliases
seeders          number    trackers
leechers         number    trackers
trackers_failed  number    trackers
files            files     files
kind             tags      files
traits           tags      d.name files
"""
# Functions of the raw values of a field, which they take in the table's order
MADE_OF: dict[str, Callable] = {
    'path': data_path,
    'realpath': seen_path,
    'is_ghost': has_no_data,
    'free': space_at,
    'sessionfile': session_file,
    'label': decoded_label,
    'tagged': tags_of,
    'xfer': operator.add,
    'ratio': true_ratio,
    'done': percent_done,
    'loaded': time_loaded,
    'started': first_time,
    'completed': first_time,
    'stopped': time_stopped,
    'active': last_time,
    'last_xfer': last_time,
    'leechtime': leech_time,
    'seedtime': seed_time,
    'tracker': first_tracker,
    'alias': alias_of,
    'seeders': functools.partial(most, 2),
    'leechers': functools.partial(most, 3),
    'trackers_failed': trackers_failed,
    'files': file_names,
    'kind': file_kinds,
    'traits': guess_traits}


def all_fields():
    """Return the table of fields by name."""
    fields = {}
    for line in FIELD_TABLE.splitlines():
        name, kind, *needs = line.split()
        fields[name] = TorrentField(kind, tuple(needs), MADE_OF.get(name))
    return fields


TORRENT_FIELDS = all_fields()


# Parts of the names of d. commands that change something, or the beginnings of parts
CHANGING = re.compile(
    r'(?<![^.])(?:add|check|clear|close|create|delete|disable|disconnect|enable|erase|initialize|'
    r'insert|open|pause|push|remove|resume|save|send_scrape|set|start|stop|tracker_announce|'
    r'tracker_send_scrape|try|unset|update)(?![^._])')


def in_quotes(text):
    """Return a text as an argument of a command of rTorrent."""
    text = text.replace('\\', '\\\\').replace('"', '\\"')
    return f'"{text}"'


def torrent_field(name) -> TorrentField:
    """Return a field of the table; custom_KEY, kind_N and d_NAME are made as needed."""
    if name in TORRENT_FIELDS:
        return TORRENT_FIELDS[name]
    stem, _, rest = re.sub('^custom([1-5])$', r'custom_\1', name).partition('_')
    if stem == 'custom' and rest:
        command = f'd.custom{rest}'
        if not re.fullmatch('[1-5]', rest):
            command = f'd.custom={in_quotes(rest)}'
        return TorrentField('custom', (command,))
    if stem == 'kind' and re.fullmatch('[0-9]{1,2}|100', rest):
        return TorrentField('tags', ('files',), functools.partial(file_kinds, percent=int(rest)))
    if stem == 'd' and re.fullmatch(r'[a-z][\w.]*', rest):
        # as a column, what changes something would be done to every torrent
        if CHANGING.search(rest):
            raise UserError(f'{name}: d.{rest} changes something: it is no field')
        return TorrentField('any', (f'd.{rest}',))
    raise UserError(f'{name!r} is no field of a torrent{nearest(name, TORRENT_FIELDS)}')


AGE_UNITS = {
    '[yY]': 31536000,
    'M': 2592000,
    '[wW]': 604800,
    '[dD]': 86400,
    '[hH]': 3600,
    '[iI]': 60,
    '[sS]': 1}
AGE = re.compile(''.join(f'(?:([0-9]{{1,6}}){unit})?' for unit in AGE_UNITS))
DATE_FORMS = ('%Y-%m-%d', '%m/%d/%Y', '%d.%m.%Y')
CLOCK_FORMS = ('', 'T%H', 'T%H:%M', 'T%H:%M:%S')
ORDER = {                               # of limit and value, since the limit is known first
    '<': operator.gt,
    '<=': operator.ge,
    '>': operator.lt,
    '>=': operator.le}
SIGNS = {
    '+': '>',
    '-': '<'}
AGES = '8w 1d12h 1y6M, with M for months and i for minutes'
ALLOWED = {
    'number': '2 1.5',
    'duration': AGES,
    'any': '2 1.5 4g',
    'custom': f'2 1.5 2024-03-15 {AGES}',
    'time': f'2024-03-15 03/15/2024 15.03.2024T14:50, Unix seconds, {AGES}'}
REGEX = re.compile('/(.*)/i?', re.S)
PLAIN_NUMBER = re.compile(r'-?[0-9]{1,18}(\.[0-9]{1,18})?')
MOST_CHARACTERS, MOST_IN_PATTERN, MOST_DEPTH = 4000, 500, 50
# Of a text that comes from elsewhere, a pattern sees so many characters: the interpreter's lock is
# held meanwhile, and a regex of the user may take quadratic time.
MOST_MATCHED = 1000
# A word is a keyword, nothing at the end, or pieces, some of them quoted. Only where a value
# begins, /.../ is a regex: it may hold quotes and (without < = > and /) spaces and commas; its
# backslashes stay. /a/,/b/ are two.
QUOTED = (
    r'((?<![^\s=<>!~,])/(?:(?:\\.|(?!\s(?:OR|NOT|[][])\s)[^/\\<=>])*|'
    r'(?:[^\s,]|,(?!/))*)/i?(?=[\s,]|$))'
    r'''|"((?:\\.|[^"\\])*)"|'([^']*)'|\\(.)''')
PIECE = re.compile(QUOTED, re.S)
WORD = re.compile(r'\s*(?:((?:[][]|OR|NOT)(?!\S)|!|\Z)|((?:%s|[^\s"\'\\])+))' % QUOTED, re.S)
CONDITION = re.compile(r'([A-Za-z_][\w.-]{0,99})(<>|<=|>=|!=|==|<|>|=|~)(.*)', re.S)
# [...] in a glob; in a /regex/ it is meant
CLASS_IN_GLOB = re.compile(r'[!:]*(?![!:/])[^[]*\[.+\]', re.S)
COMMA = '\0'                            # stands for a comma that is text
CLASS_OR_ESCAPE = re.compile(r'\\.|\[\^?\]?(?:\\.|[^]\\])*\]')
# {2}, which is exact, takes no longer
REPEATED_REPEAT = re.compile(
    r'\((?:[^()]*(?:[*+]|,\d*})|[^()]*\([^()]*(?:[*+]|,\d*})[^()]*\))[^()]*\)(?:[*+]|\{\d*,)')
STARS = re.compile(r'\*+(?![^][]*\])')   # those in [...] are none
# Words that cannot be meant as the name of a torrent
NO_NAME = re.compile(
    r'[][]{0,9}(?:and|or|not|&&?|\|\|?)?[][]{0,9}|(?!/)[^=<>]*[=<>].*', re.I | re.S)
# What a value that may be text is compared as, too: what the value of the condition fits first
COMPARED_AS = {
    'any': ('number', 'size', 'bool'),
    'custom': ('number', 'time')}
POSSIBLE = object()                     # in a row: not known yet, so a condition may hold


def mistake(what, text, at, why):
    """Return the error that shows a text of the user with a mark at the place."""
    before = ' '.join(text[:at].split())[-90:]
    after = ' '.join(text[at:].split())[:40]
    shown = f'{before} <-- here {after}'.strip()
    return UserError(f'{what} {quoted(shown, 600)}: {why}')


def glob_regex(glob):
    """Return the regex of a glob, which takes linear time: the first match after a star counts.

    fnmatch has done so from Python 3.9 on.
    """
    # Without (?s: and )\Z
    regex, *rest = [fnmatch.translate(part)[4:-3] for part in STARS.split(glob)]
    for number, part in enumerate(rest[:-1]):
        regex += f'(?=(?P<g{number}>.*?{part}))(?P=g{number})'
    if rest:
        regex += '.*' + rest[-1]
    return regex


def text_pattern(text):
    """Return what finds a /regex/, or matches a glob as a whole; the case does not matter."""
    regex = REGEX.fullmatch(text)
    if len(text) > MOST_IN_PATTERN or '{{' in text and not regex:
        raise UserError(f'allowed are a /regex/ or a glob, up to {MOST_IN_PATTERN} characters, '
                        'no template')
    if regex and REPEATED_REPEAT.search(CLASS_OR_ESCAPE.sub('x', regex[1])):
        # only the usual slip is caught
        raise UserError('a repeat in a repeated group can take for ever; allowed is e.g. (ab)+, '
                        'not (a+)+')
    try:
        with warnings.catch_warnings():
            # Of a [ in [...], which may mean more to a Python to come
            warnings.simplefilter('ignore', FutureWarning)
            if regex:
                return re.compile(regex[1], re.I).search
            # [x] as it stands is meant, too
            return re.compile(f'{re.escape(text)}|{glob_regex(text)}', re.I | re.S).fullmatch
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise UserError(f'{quoted(text)} is not a regex or glob: {error}') from None


def parse_age(text):
    """Return the seconds in an age, None for what is written as something else.

    >>> parse_age('1d12h'), parse_age('1h30m'), parse_age('2m')
    (129600.0, 5400.0, None)
    """
    # m is months to pyrocore and minutes to pyrosimple; after these it can only be minutes.
    spelt = re.sub('([wdhWDH][0-9]{1,6})m', r'\1i', text)
    return added_up(spelt, AGE, AGE_UNITS)


def parse_time(text):
    """Return the Unix seconds of a local date, or of Unix seconds; None for anything else.

    A number below EARLIEST is an age that lost its unit.
    """
    if re.fullmatch('[1-9][0-9]{8,11}', text):
        return int(text)
    spelt = text.upper().replace(' ', 'T')
    for day in DATE_FORMS:
        for clock in CLOCK_FORMS:
            with contextlib.suppress(ValueError, OverflowError):
                return time.mktime(time.strptime(spelt, day + clock))
    return None


def parse_limit(kind, text):
    """Return what a number, size, duration or time is compared with; of an age, its seconds."""
    if kind == 'size':
        return parse_size(text)
    limit = None
    if text == '0' or kind == 'number' and PLAIN_NUMBER.fullmatch(text):
        limit = float(text)
    elif kind != 'number':
        limit = parse_age(text)
    if limit is None and kind == 'time':
        limit = parse_time(text)
    if limit is None:
        raise UserError(f'{quoted(text)} is not a {kind}; allowed are e.g. {ALLOWED[kind]}')
    return limit


def label_text(text):
    """Return what a condition says of a label, decoded as the label is.

    What was encoded stands for itself: it neither begins a regex nor is part of a pattern.
    """
    def plain(encoded):
        decoded = decoded_label(encoded[0])
        if REGEX.fullmatch(text):
            return re.escape(decoded)
        return re.sub('[]*?[/]', r'[\g<0>]', decoded)
    if decoded_label(text) == text:
        return text
    return re.sub('(?:%[0-9A-Fa-f]{2})+', plain, text)


def order_test(kind, op, text):
    """Return the test of a number, size, duration, time or, where the text is one, age."""
    if op == '=' and text[:1] in SIGNS:
        op, text = SIGNS[text[0]], text[1:]
    if op == '=' and kind in ('time', 'duration') and not text.isdigit():
        raise UserError(f'{quoted(text)} does not go with =; allowed are < <= > >= =+ =-')
    return functools.partial(ORDER.get(op, operator.eq), parse_limit(kind, text))


def text_test(kind, text):
    """Return the test of a text, or of several; of tags, `:` is none and `:x` only x."""
    several = kind in ('tags', 'files')
    if several and text in ('', ':'):
        return operator.not_
    only = kind == 'tags' and text.startswith(':')
    if only:
        text = text[1:]
    if kind in ('text', 'tags') and text.startswith('/') and not REGEX.fullmatch(text):
        raise UserError(f'{quoted(text)} begins as a /regex/ and does not end as one; write '
                        f'{quoted(text + "/")}, or *{text} for the text')
    matches = text_pattern(text)

    def test(value):
        if not several:
            value = [value]
        matching = [part for part in value if matches(str(part)[:MOST_MATCHED])]
        if only and matching != value:
            return False
        return bool(matching)
    return test


def value_test(kind, op, text):
    """Return the test of one value of a condition."""
    if kind == 'size' or kind in ALLOWED:
        return order_test(kind, op, text)
    if op != '=':
        raise UserError(f'{op} does not go with {kind}; allowed are = and !=')
    if kind != 'bool':
        return text_test(kind, text)
    if parse_bool(text):
        return operator.truth
    return operator.not_


def leaf(name, kind, op, text, negated):
    """Return one condition: False for an unknown value, also when it is negated."""
    # This negates, as in pyrocore
    if op == '=' and text.startswith('!'):
        negated, text = not negated, text[1:]
    if name == 'throttle' and text.lower() == 'none':
        text = ''
    elif name.partition('_')[0] in ('kind', 'traits'):
        text = kind_of(text)
        if text.lstrip(':').startswith('.'):
            raise UserError(f'{quoted(text)} begins with a dot, as no {name} does; allowed is mkv')
    elif name == 'label':
        text = label_text(text)
    test = value_test(kind, op, text)
    if name == 'prio' and not any(map(test, range(4))):
        raise UserError('prio is 0, 1, 2 or 3: this can never be true')
    when = text.lstrip('+-')
    counts_back = kind == 'time' and parse_age(when) is not None
    # A time that was never set is known to who asks for 0
    unset_counts = when == '0'

    def holds(row, now):
        value = row.get(name)
        if value is POSSIBLE:
            return True
        if value is None:
            return False
        if kind == 'time' and value < EARLIEST and (value or not unset_counts):
            return False
        if counts_back:
            value = now - value
        return test(value) is not negated
    return holds


def mixed_leaf(name, kind, op, text, negated):
    """Return one condition on what may be a number or text, as each value turns out to be."""
    as_number = None
    for likely in COMPARED_AS[kind]:
        with contextlib.suppress(UserError):
            as_number = leaf(name, likely, op, text, negated)
            break
    as_text = None
    if op == '=' and not (as_number and text.lstrip('!')[:1] in SIGNS):
        as_text = leaf(name, 'path', op, text, negated)
    if not as_number and not as_text:
        raise UserError(f'{quoted(text)} is not a number; allowed are e.g. {ALLOWED[kind]}')

    def holds(row, now):
        value = row.get(name)
        number = PLAIN_NUMBER.fullmatch(str(value)[:40].strip())
        if as_number and number:
            return as_number({name: float(number[0])}, now)
        if as_text:
            return as_text(row, now)
        return value is POSSIBLE
    return holds


def joined(tests, every):
    """Return the test that all or any of some hold."""
    if len(tests) == 1:
        return tests[0]

    def holds(row, now):
        for test in tests:
            if test(row, now) is not every:
                return not every
        return every
    return holds


def unquoted(piece):
    """Return a piece of a word as what it stands for; a comma in it parts no values."""
    regex, double, single, escaped = piece.groups()
    text = regex or single or escaped or re.sub(r'\\(["\\])', r'\1', double or '')
    return text.replace(',', COMMA)


class Filter:
    """An rtcontrol condition, compiled; `fields` are the names it needs.

    `classes` are the conditions that hold a class of characters, as name=[ab]*, which few people
    mean who write it.

    >>> Filter('ratio>2 is_complete=yes').match({'ratio': 2.5, 'is_complete': True})
    True
    """

    def __init__(self, text: str):
        self.text = text
        self.at = 0                     # end of the word in hand
        self.key, self.word = '', ''    # the word in hand: a keyword, '' at the end, or None
        self.fields: tuple = ()
        self.classes: list[str] = []
        try:
            # Each bracket takes some of Python's stack.
            if len(text) > MOST_CHARACTERS or text.split().count('[') > MOST_DEPTH:
                raise UserError(f'too long; allowed are {MOST_CHARACTERS} characters and '
                                f'{MOST_DEPTH} brackets')
            self.read_word()
            self.test = self.expression(False, '')
        except UserError as error:
            raise mistake('condition', text, self.at, error) from None

    def match(self, row: Mapping, now: float | None = None) -> bool:
        """Tell whether a row meets the condition; ages count back from `now`."""
        if now is None:
            now = time.time()
        return self.test(row, now)

    def read_word(self):
        """Take the next word in hand."""
        word = WORD.match(self.text, self.at)
        if not word:
            raise UserError('after this, a quote has no other half')
        self.at = word.end()
        self.key, text = word[1], word[2] or ''
        if text.startswith('#'):
            raise UserError('# begins no comment here; put it on a line of its own, or quote it')
        # The backslashes of a regex stay
        if not re.fullmatch(r'''[A-Za-z_][\w.-]*~[^"']*''', text):
            text = PIECE.sub(unquoted, text)
        self.word = text

    def expression(self, negated, end):
        """expr ::= term ( 'OR' term )*;  then comes ']', or the end"""
        terms = [self.term(negated)]
        while self.key == 'OR':
            self.read_word()
            terms.append(self.term(negated))
        if self.key != end:
            raise UserError('a bracket without its other half; [ and ] stand between spaces')
        # Neither a nor b: not a, and not b
        return joined(terms, negated)

    def term(self, negated):
        """term ::= factor+"""
        factors = [self.factor(negated)]
        while self.key not in ('OR', ']', ''):
            factors.append(self.factor(negated))
        return joined(factors, not negated)

    def factor(self, negated):
        """factor ::= ( 'NOT' | '!' ) factor | '[' expr ']' | condition"""
        while self.key in ('NOT', '!'):
            negated = not negated
            self.read_word()
        if self.key is None:
            test = self.condition(negated)
        elif self.key == '[':
            self.read_word()
            test = self.expression(negated, ']')
        else:
            raise UserError('a condition is missing; allowed are e.g. ratio>2 *name* [ ... ]')
        self.read_word()
        return test

    def condition(self, negated):
        """condition ::= field op value | value;  value may be several, with commas"""
        name, op, value = 'name', '=', self.word
        match = CONDITION.fullmatch(self.word)
        if match:
            name, op, value = match.groups()
        elif self.word in TORRENT_FIELDS or NO_NAME.fullmatch(self.word):
            raise UserError('this is no condition; allowed are field=value without spaces, a glob, '
                            'NOT, OR, [ ... ] between spaces; side by side means and')
        kind = torrent_field(name).kind
        if name not in self.fields:
            self.fields += (name,)
        if op in ('!=', '<>'):
            negated = not negated
        # As in pyrocore
        elif op == '~':
            value = f'/{value}/'.replace(',', COMMA)
        only = ''
        # This one and no other
        if op == '==' and kind == 'tags':
            only = ':'
        values = [value]
        if op not in ORDER:
            op = '='
            values = value.split(',')
        if '' in values and len(values) > 1:
            raise UserError('a value is missing beside a comma')
        tests = []
        for part in values:
            part = only + part.replace(COMMA, ',')
            if CLASS_IN_GLOB.match(part):
                self.classes.append(f'{name}{op}{part}')
            make = leaf
            if kind in COMPARED_AS:
                make = mixed_leaf
            tests.append(make(name, kind, op, part, negated))
        return joined(tests, negated)


# --- Torrents --------------------------------------------------------------------------------
# A view, names of fields and a Filter enter, rows leave: a Torrent maps a field's name to its
# value. One round trip brings the columns of all torrents; one more each brings "files" and
# "trackers" of those that are left. The bytes of a .torrent file enter, a Metafile leaves; they
# are read where they lie, so that no metafile takes more than a few times its size. Any thread.

class Torrent(dict):
    """One row: torrent.size or torrent['size']; `hash` and `name` are always there."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f'the field {name!r} was not asked for') from None

    def __str__(self):
        return f"{quoted(self['name'])} {self['hash']}"


def fetch_columns(engine, view, needs):
    """Return what the d. commands in `needs` answer for all torrents of a view, by command."""
    commands = [need for need in dict.fromkeys(needs) if need.startswith('d.')]
    cells = [re.sub('^([^=]*)$', r'\1=', command) for command in commands]
    rows, size = without_errors(engine.ask([
        ('d.multicall2', '', view, *cells),
        ('view.size', '', view)]))
    # Half a list must not pass for the whole: what is not listed would count as gone.
    try:
        listed = len([row for row in rows if len(row) == len(cells)])
    # It is no list at all
    except TypeError:
        listed = 0
    if listed != size:
        raise RpcError(f'{engine.address.where}: only {listed} of the {size!r} items '
                       f'of view {view!r} were listed')
    return {command: [row[at] for row in rows] for at, command in enumerate(commands)}


def keep(columns, wanted):
    """Keep the wanted torrents, and drop the others."""
    for need, values in columns.items():
        columns[need] = list(itertools.compress(values, wanted))


def ask_second(engine, columns, source):
    """Add the answers to a second question; torrents that have gone meanwhile are dropped."""
    method, *cells = SOURCES[source].split()
    answers = engine.ask([(method, item, '', *cells) for item in columns['d.hash']])
    columns[source] = answers
    # An item that was erased since the list was made is no error; anything else is.
    keep(columns, [not isinstance(answer, HashNotFound) for answer in answers])
    without_errors(columns[source])


def add_field(columns, name, field):
    """Work out a field of all rows."""
    values = columns[field.needs[0]]
    if field.value:
        values = map(field.value, *[columns[need] for need in field.needs])
    for row, value in zip(columns['row'], values):
        row[name] = value


def listed_rows(engine, view, names, condition):
    """Do the work of list_torrents()."""
    now = time.time()
    tested = getattr(condition, 'fields', ())
    fields = {name: torrent_field(name) for name in ('hash', 'name', *tested, *names)}
    needs = sum([field.needs for field in fields.values()], ())
    # Columns of raw values, and the rows in the making: they are dropped together.
    columns = fetch_columns(engine, view, needs)
    slow = {*SOURCES, 'seen', 'own_session'}
    later = [name for name in tested if not slow.isdisjoint(fields[name].needs)]
    columns['row'] = [Torrent(dict.fromkeys(later, POSSIBLE)) for _ in columns['d.hash']]
    constants = {
        'now': now,
        'aliases': engine.aliases,
        'session': engine.session_path,
        'cwd': engine.cwd,
        'own_session': ''}
    # Whether torque sees rTorrent's files costs a question: only who needs it asks.
    if 'seen' in needs:
        constants['seen'] = sees_same_files(engine)
    if 'own_session' in needs and engine.session_path and not why_unseen(engine):
        constants['own_session'] = os.path.join(engine.cwd, engine.session_path)
    for need, value in constants.items():
        columns[need] = itertools.repeat(value)
    for name in tested:
        if name not in later:
            add_field(columns, name, fields.pop(name))
    if condition:
        keep(columns, [condition.match(row, now) for row in columns['row']])
    # The second questions cost a call for each torrent, so only those that are left are asked.
    for source in SOURCES:
        if source in needs:
            ask_second(engine, columns, source)
    for name, field in fields.items():
        add_field(columns, name, field)
    if condition:
        keep(columns, [condition.match(row, now) for row in columns['row']])
    return columns['row']


def list_torrents(engine, view, names, condition: Filter | None = None) -> list[Torrent]:
    """Return the torrents of a view that meet a Filter, with hash, name and the given fields.

    One round trip, and one more for each second question. Raises RpcError, also when the list is
    shorter than the view (half a list must not pass for the whole), or holds what it should not.
    """
    try:
        return listed_rows(engine, view, names, condition)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise RpcError(f'{engine.address.where}: what it tells of the items in view {view!r} is '
                       f'not understood: {error_text(error)}') from error


# A hostile metafile of 57 MB, all empty lists, took 2.2 GiB as Python's objects. So values are
# skipped where they lie, and only those that somebody needs are built.
BENCODED = re.compile(rb'i(0|-?[1-9][0-9]{0,18})e|(0|[1-9][0-9]{0,9}):|[ld]')
UNUSABLE_NAME = re.compile(rb'\.{0,2}|.*[/\0].*', re.S)
OUTER_KEYS = (b'announce', b'announce-list', b'info', b'magnet-uri')
INFO_KEYS = (b'name', b'length', b'pieces', b'piece length', b'files', b'file tree')
# What stands before the first text of a list of lists
NO_TEXT = re.compile(rb'(?:[le]|0:)*')
MAGNET_HASH = re.compile('[?&]xt=urn:btih:([0-9a-fA-F]{40}|[a-zA-Z2-7]{32})(?![^&])')
METAFILE_LIMIT = 16 << 20               # bytes
MOST_NESTED = 200                       # lists and dictionaries in another
LEAST_PIECE = 1025                      # bytes; rTorrent takes no smaller pieces
MOST_IN_ENTRY = 1 << 16                 # bytes of what a metafile says of one file


def bencoded_text(content, at=0):
    """Return the text that begins there; None for anything else."""
    head = BENCODED.match(content, at)
    if not head or not head[2]:
        return None
    return content[head.end():head.end() + int(head[2])]


def bencoded_number(content, at=0):
    """Return the whole number that begins there; None for anything else."""
    head = BENCODED.match(content, at)
    if not head or not head[1]:
        return None
    return int(head[1])


def bencoded_end(content, at, depth=0):
    """Return where the bencoded value that begins there ends; ValueError if it does not.

    Nothing is built. Only for a text at the very end, that may be where nothing is any more.
    """
    head = BENCODED.match(content, at)
    if not head or depth > MOST_NESTED:
        raise ValueError(f'not bencoded at byte {at}')
    at = head.end() + int(head[2] or 0)
    if head[0] in (b'l', b'd'):
        while content[at:at + 1] != b'e':
            at = bencoded_end(content, at, depth + 1)
        at += 1
    return at


def bencoded_items(content, at):
    """Give (start, end) of what is in a list."""
    at += 1
    while content[at:at + 1] != b'e':
        end = bencoded_end(content, at)
        yield at, end
        at = end


def bencoded_members(content, at):
    """Give (key, start, end) of each value of a dictionary."""
    if content[at:at + 1] != b'd':
        raise ValueError(f'not bencoded: no dictionary at byte {at}')
    at += 1
    while content[at:at + 1] != b'e':
        key, start = bencoded_text(content, at), bencoded_end(content, at)
        if key is None:
            raise ValueError(f'not bencoded: no key at byte {at}')
        at = bencoded_end(content, start)
        yield key, start, at


def bencoded_value(content, at) -> tuple[Any, int]:
    """Return a value that lies whole in there, and where it ends; text stays bytes.

    Each byte is read once: nested lists cost no more than others.
    """
    head = content[at:at + 1]
    if head == b'i':
        return bencoded_number(content, at), bencoded_end(content, at)
    if head not in (b'l', b'd'):
        return bencoded_text(content, at), bencoded_end(content, at)
    values = []
    at += 1
    while content[at:at + 1] != b'e':
        value, at = bencoded_value(content, at)
        values.append(value)
    if head == b'l':
        return values, at + 1
    keys = values[::2]
    if len(values) % 2 or not all(isinstance(key, bytes) for key in keys):
        raise ValueError(f'not bencoded: no key in what ends at byte {at}')
    return dict(zip(keys, values[1::2])), at + 1


def bdecode(content, at=0):
    """Return a value that lies whole in there; text stays bytes.

    >>> bdecode(b'd4:name1:ae')
    {b'name': b'a'}
    """
    value, _ = bencoded_value(content, at)
    return value


def bencoded_files(content, at):
    """Give what a metafile says of each of several files: b'path', b'length', and more."""
    if content[at:at + 1] == b'l':
        for start, end in bencoded_items(content, at):
            if end - start > MOST_IN_ENTRY:
                raise ValueError(f'a file that takes {end - start} bytes to describe')
            yield bdecode(content, start)


def shown_path(path):
    """Return a path, whose parts stand between NULs, for a message."""
    return quoted(path.replace(b'\0', b'/').decode('utf-8', 'replace'))


def require_apart(path, other):
    """Raise ValueError where two files cannot both be there."""
    if (other + b'\0').startswith(path + b'\0'):
        raise ValueError(f'{shown_path(path)} and {shown_path(other)} cannot both be files: '
                         'rTorrent would abort')


def sum_up(files) -> tuple[int, bytes]:
    """Return the size of several files, and the name of the largest.

    ValueError where rTorrent does not take them, or aborts: 0.9.8 and 0.16 do so where a file has
    the path of another, or lies below it.
    """
    paths = []
    before = b'/'                       # no path
    size, most, largest = 0, -1, b''
    for entry in files:
        try:
            # rTorrent takes empty parts, and the same file without them; a dictionary has no slice
            parts, length = [*filter(None, entry[b'path'][:])], entry[b'length']
            path, name = b'\0'.join(parts), parts[-1]
            is_wrong = length < 0 or any(map(UNUSABLE_NAME.fullmatch, parts))
            is_padding = b'p' in entry.get(b'attr', b'')
        except (TypeError, LookupError):
            raise ValueError('a file in it has no path, or no length') from None
        if is_wrong:
            raise ValueError(f'path or length of the file {shown_path(path)} in it is not usable')
        size += length
        if length > most:
            most, largest = length, name
        # Padding (BEP 47) has the same path again and again; 0.16 lives with that, and 0.9.8 does
        # not open it. But right after a file of that path, or above it, both abort.
        require_apart(before, path)
        before = path
        if not is_padding:
            paths.append(path)
    # In order, what lies below a file, or is the same, comes right after it.
    paths.sort()
    for path, other in zip(paths, itertools.islice(paths, 1, None)):
        require_apart(path, other)
    return size, largest


class Metafile(NamedTuple):
    """What a .torrent file says; bytes that are no UTF-8 are surrogates in its texts."""
    content: bytes
    info_hash: str
    name: str
    tracker: str
    main_file: str                      # name of the largest file
    files_at: int                       # where its list of files stands; 0: it has one file

    def files(self):
        """Give what it says of each file of several: b'path' and b'length'."""
        return bencoded_files(self.content, self.files_at)


def first_text(content, start, end):
    """Return a text, or the first one in lists of lists; '' without one."""
    at = NO_TEXT.match(content, start, end).end()       # type: ignore[union-attr]
    if at == end:
        return ''
    return (bencoded_text(content, at) or b'').decode('utf-8', 'surrogateescape')


def parse_magnet(content, uri):
    """Return what a magnet link says of its item, as rTorrent has it until the rest is there."""
    import base64
    import urllib.parse
    found = MAGNET_HASH.search(uri)
    if not found:
        raise ValueError('no `info` in it')
    info_hash = found[1].upper()
    if len(info_hash) == 32:
        info_hash = base64.b32decode(info_hash).hex().upper()
    name = f'{info_hash}.meta'
    _, _, tracker = uri.partition('&tr=')
    tracker = urllib.parse.unquote(tracker.partition('&')[0])
    return Metafile(content, info_hash, name, tracker, name, 0)


def info_facts(content, at) -> dict[bytes, int]:
    """Return where the values of INFO_KEYS stand in an `info`; 0 for one that it does not have."""
    facts, last = dict.fromkeys(INFO_KEYS, 0), b''
    for key, start, _ in bencoded_members(content, at):
        # rTorrent writes them in order, and the info-hash would be another one.
        if key <= last:
            raise ValueError('the keys of `info` are not in order')
        last = key
        if key in facts:
            facts[key] = start
    return facts


def resume_entries(content, at):
    """Give where each file and each tracker of a `libtorrent_resume` stands."""
    if content[at:at + 1] != b'd':      # which rTorrent passes over
        return
    for key, start, _ in bencoded_members(content, at):
        kind = content[start:start + 1]
        if key == b'files' and kind == b'l':
            for entry, _ in bencoded_items(content, start):
                yield entry
        elif key == b'trackers' and kind == b'd':
            for _, entry, _ in bencoded_members(content, start):
                yield entry


def require_harmless(content, at):
    """Raise ValueError where rTorrent would abort over a `libtorrent_resume`, or hang."""
    try:
        for entry in resume_entries(content, at):
            for key, start, _ in bencoded_members(content, entry):
                if key == b'group' and bencoded_number(content, start) not in range(33):
                    raise ValueError('the group of a tracker is not 0 to 32')
    except ValueError as error:
        raise ValueError('rTorrent would abort over its `libtorrent_resume`, or hang: '
                         f'{error}') from None


def parse_metafile(content: bytes) -> Metafile:
    """Return what the bytes of a metafile say.

    ValueError when they are none, or not whole, or not what rTorrent takes.
    """
    import hashlib
    outer = dict.fromkeys(OUTER_KEYS, (0, 0))
    for key, start, end in bencoded_members(content, 0):
        if key in outer:
            outer[key] = start, end
        if key == b'libtorrent_resume':
            require_harmless(content, start)
    begin, end = outer[b'info']
    if not begin:
        uri = first_text(content, *outer[b'magnet-uri'])
        return parse_magnet(content, uri[:MOST_IN_ENTRY])
    facts = info_facts(content, begin)
    # The name becomes a file or folder, so it has to be one name.
    name = bencoded_text(content, facts[b'name'])
    if name is None or UNUSABLE_NAME.fullmatch(name):
        raise ValueError('no usable `name` in it')
    pieces = bencoded_text(content, facts[b'pieces'])
    if not pieces and facts[b'file tree']:
        raise ValueError('it has no v1 part, which rTorrent needs')
    piece_length = bencoded_number(content, facts[b'piece length']) or 0
    if not pieces or piece_length < LEAST_PIECE:
        raise ValueError('no pieces, or no usable `piece length` in it')
    size, main_file = bencoded_number(content, facts[b'length']) or 0, name
    # As in rTorrent, it has one file then.
    if facts[b'length']:
        facts[b'files'] = 0
    if facts[b'files']:
        size, main_file = sum_up(bencoded_files(content, facts[b'files']))
    # No files, and less than no bytes, have no pieces.
    if len(pieces) != 20 * -(-size // piece_length):
        raise ValueError(f'its {len(pieces) / 20:g} pieces are not those of {size} bytes')
    texts = [first_text(content, *outer[key]) for key in (b'announce', b'announce-list')]
    return Metafile(
        content,
        hashlib.sha1(memoryview(content)[begin:end]).hexdigest().upper(),
        name.decode('utf-8', 'surrogateescape'),
        texts[0] or texts[1],
        main_file.decode('utf-8', 'surrogateescape'),
        facts[b'files'])


def names_in_info(content) -> dict[bytes, bytes]:
    """Return the name in the `info` of a metafile, and name.utf-8 and the like, bencoded."""
    names = {}
    for key, start, _ in bencoded_members(content, 0):
        if key == b'info':
            for name, at, end in bencoded_members(content, start):
                if name.startswith(b'name'):
                    names[name] = content[at:end]
    return names


def read_metafile(path) -> Metafile:
    """Return a metafile; raises ValueError when it is none, not whole, or too large."""
    status = os.stat(path)
    # A named pipe would block for ever
    if not stat.S_ISREG(status.st_mode):
        raise ValueError('no regular file')
    if not 0 < status.st_size <= METAFILE_LIMIT:
        raise ValueError(f'empty, or larger than {show_size(METAFILE_LIMIT)}')
    with open(path, 'rb') as stream:
        return parse_metafile(stream.read(status.st_size))


# --- Data ------------------------------------------------------------------------------------
# Whose data is it? An Item of rTorrent enters; what leaves is its OwnData, proven to be its own,
# or a LoggableError that says why not: every doubt keeps the data. A Removal is a note in
# state_dir, on the disk before anything changes: a later run finishes what a crash has left.
# data.lock in state_dir keeps other threads and processes away, from the proof of an item on
# until all is done with it. An owner is (which rTorrent, hash).

# What of a name any rTorrent shows as it is; see DOUBTFUL.
NOT_PLAIN = re.compile('%[0-9A-Fa-f]{2}|[^ -~]|[?%]')
NOTE = 'removal.'                       # names of notes begin so
NOTED = 'hash name session engine state is_open is_active'.split()      # and its data
BUSY = 'torque_leaves_it_alone'         # what the following answer where they do nothing


def unless(condition, command) -> tuple:
    """Return a command that rTorrent does not do to an item that meets a condition just then."""
    return 'branch', condition, f'cat={BUSY}', f'd.{command}='


# Over these 0.9.8 may hang for good while it checks the item. A check that failed is over.
STOP, CLOSE, ERASE, PAUSE = (unless('and={d.hashing=,not=$d.hashing_failed=}', command)
                             for command in ('stop', 'close', 'erase', 'pause'))
# What was opened for a look is not closed where somebody has started it since.
CLOSE_AGAIN = unless('or={d.hashing=,d.state=}', 'close')
PAUSE_TRIES = 50                        # a tenth of a second between them
TEXTS = dict.fromkeys('hash name base_path directory directory_base bitfield cwd session path '
                      'frozen_path'.split(), str)       # of what is asked; the rest are numbers


class ItemFile(NamedTuple):
    """A file as rTorrent tells of it; each field is an f. command."""
    path: str
    frozen_path: str                    # where rTorrent has opened it
    size_bytes: int
    completed_chunks: int               # may be one too high
    range_first: int                    # its pieces, from that one on
    range_second: int                   # and before this one
    priority: int
    is_created: int                     # does rTorrent find a file there, right now?


def require_done(answers):
    """Raise what has kept commands, of which these are the answers, from being done."""
    if BUSY in answers:
        raise HeldBack('it is being checked')
    without_errors(answers)


class Item(NamedTuple):
    """An item as rTorrent tells of it at one moment; each field up to `cwd` is a d. command."""
    hash: str
    name: str
    is_open: int
    is_active: int
    state: int
    hashing: int
    hashing_failed: int
    base_path: str
    directory: str
    directory_base: str
    is_multi_file: int
    complete: int
    bitfield: str                       # in hexadecimal; empty unless it is checked
    completed_bytes: int
    down_total: int
    timestamp_started: int
    cwd: str                            # where relative paths start from
    session: str                        # folder of the session, absolute
    files: list[ItemFile]
    engine: Engine

    def absolute(self, path) -> str:
        """Return what a path of rTorrent is from anywhere."""
        return os.path.join(self.cwd, path)

    def pieces(self) -> str:
        """Return a character for each piece: 1 it is there, 0 it is not, ? that is not known."""
        count = max((file.range_second for file in self.files), default=0)
        if self.complete:
            return '1' * count
        if not self.bitfield:
            return '?' * count
        return bin(int('1' + self.bitfield, 16))[3:]

    def paths(self, root, names) -> list[str]:
        """Return where its files lie, by name below a root; the root is an only file itself."""
        if self.is_multi_file:
            return [f'{root}/{name}' for name in names]
        return [root]

    def tell(self, *commands: tuple):
        """Have rTorrent do commands, without the hash in them, with the item."""
        require_done(self.engine.tell(
            [(name, self.hash, *params) for name, *params in commands]))


class OwnFile(NamedTuple):
    """A file that is proven to be an item's own, and how it was then."""
    path: str
    device: int                         # may be another when the disk is mounted again
    inode: int
    size: int
    changed: int                        # nanoseconds

    @classmethod
    def at(cls, path, status: os.stat_result) -> OwnFile:
        return cls(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def is_same(self, status: os.stat_result):
        """Tell whether a file is this one, and has not changed."""
        return OwnFile.at(self.path, status)._replace(device=self.device) == self


class OwnData(NamedTuple):
    """What an item has on the disk."""
    root: str                           # its folder, or its only file
    files: list[OwnFile]
    folders: list[str]                  # they go when they are empty; the deepest first


def is_row(row, fields: Iterable[str]):
    """Tell whether an answer has a text or a number for each field, as it should be."""
    kinds = [TEXTS.get(name, int) for name in fields]
    return isinstance(row, list) and len(row) == len(kinds) and all(map(isinstance, row, kinds))


def ask_item(engine: Engine, info_hash: str) -> Item:
    """Return an item as it is now; raises HashNotFound where there is none."""
    *fields, _, _ = Item._fields
    calls: list[tuple] = [
        ('d.' + re.sub('^(timestamp|down)_', r'\1.', name), info_hash) for name in fields[:-2]]
    columns = [f'f.{name}=' for name in ItemFile._fields]
    calls += [('system.cwd', ''), ('session.path', ''), ('f.multicall', info_hash, '', *columns)]
    *facts, rows = without_errors(engine.ask(calls))
    if not (is_row(facts, fields) and isinstance(rows, list)
            and all(is_row(row, ItemFile._fields) for row in rows)):
        raise RpcError(f'{engine.address.where}: what it tells of item {info_hash} is not '
                       'understood')
    item = Item._make([*facts, [ItemFile(*row) for row in rows], engine])
    return item._replace(session=item.absolute(item.session))


@contextlib.contextmanager
def opened(engine: Engine, info_hash: str) -> Iterator[tuple[Item, bool]]:
    """Give an item that rTorrent has open, and whether it was closed before.

    Base paths of a closed item are old, or empty: it is opened, and afterwards closed again.
    """
    item = ask_item(engine, info_hash)
    if item.hashing and not item.hashing_failed:
        raise HeldBack('it is being checked')
    if item.is_open:
        yield item, False
        return
    close = CLOSE_AGAIN
    if item.state:
        close = CLOSE
    try:
        item.tell(('d.open',))
        yield ask_item(engine, info_hash), True
    finally:
        with contextlib.suppress(RpcError, HeldBack):   # it may be erased by now
            item.tell(close)


def pause_again(item: Item) -> None:
    """Pause an item, once the check that may follow a start is over."""
    for _ in range(PAUSE_TRIES):
        with contextlib.suppress(HeldBack):
            item.tell(PAUSE)
            return
        time.sleep(0.1)
    logging.getLogger('torque.data').warning('%s %s was paused, and is not any more: it is being '
                                             'checked', quoted(item.name), item.hash)


def start_again(item: Item, state: int) -> None:
    """Bring an item to the state that it had, or that d.state says it is to have by now."""
    if state:
        # In one request, for a crash between them would leave it stopped. d.start alone does
        # nothing where d.state is 1 already.
        with contextlib.suppress(HeldBack):     # what is being checked goes on by itself
            item.tell(('d.open',), STOP, ('d.start',))
        if item.state and item.is_open and not item.is_active:
            pause_again(item)
    elif item.is_open:
        item.tell(('d.open',))
    else:
        with contextlib.suppress(HeldBack):
            item.tell(CLOSE_AGAIN)


def save_session(item: Item) -> None:
    """Have rTorrent write down where an item is; LoggableError where it does not.

    0.16 does so later, and may forget it while it is writing something else.
    """
    path = f'{item.session}/{item.hash}.torrent.rtorrent'
    if not os.path.exists(path):                # no session folder
        return
    place = os.fsencode(item.directory_base)
    wanted = b'9:directory%d:%s' % (len(place), place)
    if DOUBTFUL.search(item.directory_base):
        wanted = os.path.dirname(place)         # the name itself has other bytes
    for attempt in range(200):
        if attempt % 20 == 0:
            item.tell(('d.save_full_session',))
        with open(path, 'rb') as stream:
            if wanted in stream.read():
                return
        time.sleep(0.05)
    raise LoggableError(f'rTorrent does not write {path}')


def has_item(engine: Engine, info_hash: str, session: str) -> bool | None:
    """Tell whether an rTorrent has an item; None where its session is another."""
    there, path, cwd = engine.ask([
        ('d.hash', info_hash), ('session.path', ''), ('system.cwd', '')])
    without_errors([path, cwd])
    if not path or os.path.join(cwd, path) != session:
        return None
    if isinstance(there, HashNotFound):
        return False
    without_errors([there])
    return True


def erase(item: Item) -> None:
    """Erase an item from rTorrent; raises RpcError where that has not happened for sure."""
    commands = [(name, item.hash, *params) for name, *params in (STOP, CLOSE, ERASE)]
    try:
        erased = item.engine.tell(commands)[-1]
    except Unreachable as error:
        # An answer that never came is no answer, neither yes nor no.
        if has_item(item.engine, item.hash, item.session) is False:
            return
        raise Unreachable(f'{error}; it may be there still') from None
    require_done([erased])


def plain_part(name) -> str:
    r"""Return what of a name comes through every rTorrent as it is.

    >>> plain_part('caf\xe9 1.bin') == plain_part('caf? 1.bin')
    True
    """
    return NOT_PLAIN.sub('', name)


def stands_for(shown: str, name: str) -> bool:
    """Tell whether what rTorrent shows may be a name."""
    if DOUBTFUL.search(shown):
        return plain_part(shown) == plain_part(name)
    return shown == name


def tell_place(item, root):
    """Have rTorrent look for an item at a root; a name that it has itself is not sent."""
    folder, last = os.path.split(root)
    command = ('d.directory_base.set', root)
    if not item.is_multi_file:
        command = ('d.directory_base.set', folder)
    elif stands_for(item.name, last):
        command = ('d.directory.set', folder)
    # Not in one request: done to what is being checked, the second kills 0.9.8
    item.tell(CLOSE)
    item.tell(command)


def is_at(item, root):
    """Tell whether rTorrent looks for an item at a root."""
    place = item.absolute(item.directory_base)
    folder, last = os.path.split(root)
    if not item.is_multi_file:
        return place == folder
    return os.path.dirname(place) == folder and stands_for(os.path.basename(place), last)


def require_one(key, facts):
    """Raise ValueError where a metafile has another value for a key, too, as name.utf-8."""
    for other, value in facts.items():
        if other.startswith(key + b'.') and value != facts[key]:
            raise ValueError(f'it says another {key.decode()} as {shown_path(other)}')


def names_of_metafile(item: Item) -> tuple[str, list[str]]:
    """Return the true name of an item and the paths of its files, as its metafile has them.

    Bytes that are no UTF-8 are surrogates. Raises HeldBack without the right metafile.
    """
    try:
        meta = read_metafile(f'{item.session}/{item.hash}.torrent')
        if meta.info_hash != item.hash:
            raise ValueError('it is that of another item')
        paths = []
        require_one(b'name', names_in_info(meta.content))
        for entry in meta.files():
            require_one(b'path', entry)
            paths.append(os.fsdecode(b'/'.join(entry[b'path'])))
        return meta.name, paths or [meta.name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeldBack('its name came through badly, and its metafile in the session '
                       f'folder does not tell the true one: {error_text(error)}') from None


def true_paths(item: Item) -> tuple[str, list[str]]:
    """Return where the data of an open item is, and the names of its files in there."""
    shown = [file.path for file in item.files]
    for file, expected in zip(item.files, item.paths(item.base_path, shown)):
        # Padding (BEP 47) is on no disk, and has no path.
        if not item.base_path or file.frozen_path not in ('', expected):
            raise HeldBack(f'rTorrent has {quoted(file.frozen_path)} open, and not what '
                           f'lies at {quoted(item.base_path)}')
    root = item.absolute(item.base_path)
    if not any(map(DOUBTFUL.search, [root, *shown])):
        return root, shown
    name, names = names_of_metafile(item)
    folder, last = os.path.split(root)
    if stands_for(last, name):
        # A folder may have been renamed, to another name that comes through as this one does.
        if item.is_multi_file and DOUBTFUL.search(last) and identity(folder):
            for other in os.listdir(folder):
                if other != name and not DOUBTFUL.search(other) and stands_for(last, other):
                    raise HeldBack(f'{quoted(root)} may be {quoted(name)}, or '
                                   f'{quoted(other)}')
        last = name
    elif DOUBTFUL.search(last):
        folder = last
    if DOUBTFUL.search(folder) or len(names) != len(shown) or not all(
            map(stands_for, shown, names)):
        raise HeldBack(f'its path {quoted(root)} came through badly')
    return os.path.join(folder, last), names


def check_file(path, file: ItemFile, item: Item, pieces: str) -> OwnFile | None:
    """Return a file of an item, None where it is not there; HeldBack where in doubt."""
    try:
        status = os.lstat(path)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise LoggableError(f'{quoted(path)}: {error.strerror}') from None
        if file.is_created:
            raise HeldBack(f'rTorrent sees {quoted(path)}, and torque does not') from None
        return None
    if not file.is_created:
        raise HeldBack(f'torque sees {quoted(path)}, and rTorrent does not')
    if not stat.S_ISREG(status.st_mode):
        raise HeldBack(f'{quoted(path)} is a link, or no file')
    is_whole = {*pieces} == {'1'}
    if status.st_size > file.size_bytes or is_whole and status.st_size < file.size_bytes:
        size = counted(status.st_size, 'byte')
        raise HeldBack(f'{quoted(path)} has {size} instead of the '
                       f'{file.size_bytes} that it should have')
    # A user's file may lie where an item that has nothing of it yet would have its own.
    begun = item.down_total and file.priority and item.timestamp_started
    empty = item.timestamp_started and not status.st_blocks
    some = '1' in pieces or '?' in pieces and file.completed_chunks > 1
    if not some and not begun and not empty and status.st_size:
        raise HeldBack(f'{quoted(path)} may not be its own: rTorrent has no piece of it')
    return OwnFile.at(path, status)


def folders_up_to(root, paths) -> list[str]:
    """Return the folders that files are in, up to `root`; the deepest first."""
    found = {root}
    for path in paths:
        folder = os.path.dirname(path)
        while folder not in found:
            found.add(folder)
            folder = os.path.dirname(folder)
    return sorted(found, key=len, reverse=True)


def own_data(item: Item) -> OwnData:
    """Return what an open item has on the disk, proven to be its own; else HeldBack."""
    if not item.is_open:
        raise HeldBack('rTorrent cannot open it')
    require_same_files(item.engine)
    root, names = true_paths(item)
    paths, folders = item.paths(root, names), []
    if item.is_multi_file:
        folders = folders_up_to(root, paths)
    for folder in folders:
        if os.path.islink(folder) or os.path.basename(folder) == '..':
            raise HeldBack(f'{quoted(folder)} is a link, or leads out of it')
    pieces, own = item.pieces(), []
    for path, file in zip(paths, item.files):
        if file.frozen_path:
            part = pieces[file.range_first:file.range_second]
            own.append(check_file(path, file, item, part))
    # Other downloads may come to lie in a folder that is not named after this one.
    if folders and not stands_for(item.name, os.path.basename(root)):
        folders.remove(root)
    return OwnData(root, [*filter(None, own)], folders)


def freed_by(data: OwnData) -> int:
    """Return the bytes that deleting data frees: none of a file with a hard link elsewhere."""
    links = collections.Counter((file.device, file.inode) for file in data.files)
    freed = 0
    for file in data.files:
        status = os.lstat(file.path)
        if links[file.device, file.inode] == status.st_nlink:
            freed += status.st_blocks * 512 // status.st_nlink
    return freed


def place_of(path: str) -> tuple[Any, str]:
    """Return the identity of the folder that a path lies in, and its name there."""
    folder, name = os.path.split(path)
    return identity(folder) or folder, name


class Users:
    """Which items use which folders and lone files, by identity.

    engines: that of the job first; `hashes` of its items are left out. HeldBack where it is
    not known what an item uses. An owner is (which rTorrent, hash).
    """

    def __init__(self, engines: list[Engine], hashes=()):
        self.hashes = hashes
        self.engines: dict = {}         # by pid, or address
        self.folders: dict = {}         # identity -> [(owner, path)]
        self.files: dict = {}           # identity -> [(owner, path, identity of its folder)]
        self.places: dict = {}          # (identity of folder, name) -> path
        self.names: dict = {}           # path of a folder -> plain part -> paths in it
        self.add_engine(engines[0], hashes)
        for engine in engines[1:]:
            try:
                self.add_engine(engine, ())
            except RpcError as error:
                raise HeldBack(f'what other items use is not known: {error}') from None

    def add_engine(self, engine: Engine, hashes):
        """Add the items of an rTorrent, by directory and by base path: one may be old."""
        pid, where = rtorrent_process(engine), engine.address.where
        key = f'process {pid}'          # it may have several addresses
        if not pid:
            key = where
        if key in self.engines:
            return
        self.engines[key] = engine
        if pid and not engine.same_files and not has_our_mounts(pid):
            raise HeldBack(f'what other items use is not known: rTorrent at {where} sees '
                           'other mounts than torque')
        needs = ('d.hash', 'd.base_path', 'd.directory', 'd.name', 'd.is_multi_file')
        columns = fetch_columns(engine, 'default', needs)
        hidden, cwd = without_errors(engine.ask(
            [('view.size_not_visible', '', 'default'), ('system.cwd', '')]))
        if hidden:
            raise HeldBack('what other items use is not known: the view "default" of '
                           f'rTorrent at {where} hides {hidden}')
        for info_hash, base, directory, name, is_multi in zip(*columns.values()):
            if info_hash in hashes:
                continue
            if directory and not is_multi:
                directory = os.path.join(directory, name)
            try:
                for place in {base, directory} - {''}:
                    for path in self.meanings(os.path.join(cwd, place)):
                        self.places[place_of(path)] = path
                        self.add((key, info_hash), path)
            except OSError as error:
                raise HeldBack(f'what item {quoted(name)} {info_hash} uses is not known: '
                               f'{quoted(error.filename)}: {error.strerror}') from None

    def meanings(self, path) -> list[str]:
        """Return the paths on the disk that one may mean which came through badly."""
        if not DOUBTFUL.search(path):
            return [path]
        above, name = os.path.split(path)
        paths = []
        for folder in self.meanings(above):
            if DOUBTFUL.search(name):
                paths += self.named_like(folder).get(plain_part(name), [])
            else:
                paths.append(os.path.join(folder, name))
        return paths

    def named_like(self, folder) -> dict[str, list[str]]:
        """Return the paths in a folder by the plain part of their names."""
        if folder not in self.names:
            names = self.names[folder] = collections.defaultdict(list)
            if identity(folder):
                for name in os.listdir(folder):
                    names[plain_part(name)].append(os.path.join(folder, name))
        return self.names[folder]

    def add(self, owner: tuple[str, str], path):
        """Add a file, or a folder with all that is below it, links followed."""
        left, known = [path], set()
        while left:
            path = left.pop()
            found = identity(path)
            if found is None or found in known:
                continue
            known.add(found)
            try:
                with os.scandir(path) as entries:
                    left += [entry.path for entry in entries
                             if entry.is_symlink() or entry.is_dir(follow_symlinks=False)]
                self.folders.setdefault(found, []).append((owner, path))
            except NotADirectoryError:
                folder = identity(os.path.dirname(os.path.realpath(path)))
                self.files.setdefault(found, []).append((owner, path, folder))
            except FileNotFoundError:   # it has gone meanwhile
                continue

    def of(self, data: OwnData) -> dict[tuple, str]:
        """Return who may use some of the data: owner -> path."""
        users: dict = {}
        for file in data.files:
            folder, name = place_of(file.path)
            users.update(self.folders.get(folder, ()))
            for owner, path, other in self.files.get((file.device, file.inode), ()):
                # Another name of it is a hard link, which does not need this one.
                same = folder == other and os.path.basename(path).lower() == name.lower()
                if same or os.path.islink(path) or os.lstat(file.path).st_nlink == 1:
                    users[owner] = path
        return users

    def is_another(self, key):
        """Tell whether an rTorrent is for sure not that of the job, by another address."""
        return all(name.startswith('process ') for name in (key, next(iter(self.engines))))

    def has_all(self, owner: tuple[str, str], data: OwnData):
        """Tell whether an item has all files of data, too, by its own list and as its own."""
        key, info_hash = owner
        if why_unseen(self.engines[key]) or info_hash in self.hashes and not self.is_another(key):
            return False
        item = ask_item(self.engines[key], info_hash)
        base = item.directory
        if item.is_open:
            base = item.base_path
        elif not item.is_multi_file:
            base = os.path.join(item.directory, item.name)
        paths = item.paths(base, [file.path for file in item.files])
        known = {identity(item.absolute(path)) for path in paths}
        return bool(item.completed_bytes) and all(
            (file.device, file.inode) in known for file in data.files)


def moved(data: OwnData, root: str) -> OwnData:
    """Return data as it lies at another root, or would."""
    start = len(data.root)
    files = [file._replace(path=root + file.path[start:]) for file in data.files]
    return OwnData(root, files, [root + folder[start:] for folder in data.folders])


def files_now(data: OwnData) -> list[OwnFile] | None:
    """Return the files of data, whatever has been written to them; None if they are not all there.

    None, too, where another file has taken the place of one.
    """
    files = []
    for file in data.files:
        with contextlib.suppress(OSError):
            files.append(OwnFile.at(file.path, os.lstat(file.path)))
    if [file.inode for file in files] != [file.inode for file in data.files]:
        return None
    return files


def copy_data(data: OwnData, root: str) -> OwnData:
    """Return a whole copy of data at a new root, of hard links where that is possible."""
    import shutil
    copies = []
    for file in data.files:
        copy = root + file.path[len(data.root):]
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        try:
            os.link(file.path, copy)
        except OSError:                 # another file system, or one without hard links
            copy_file(file.path, copy)
        if not file.is_same(os.lstat(file.path)):
            raise LoggableError(f'{quoted(file.path)} changed while it was copied')
        copies.append(OwnFile.at(copy, os.lstat(copy)))
    for folder, _, _ in os.walk(root, topdown=False):
        original = data.root + folder[len(root):]
        give_owner(folder, os.stat(original))
        with contextlib.suppress(OSError):
            shutil.copystat(original, folder)
        sync(folder)
    sync(os.path.dirname(root))
    return OwnData(root, copies, data.folders)


def require_room(data: OwnData, folder: str) -> None:
    """Raise HeldBack where the disk of a folder, made or not, has no room for data."""
    device, free = disk_of(folder)
    needed = 0
    for file in data.files:
        if file.device != device:       # else a hard link will do
            needed += os.lstat(file.path).st_blocks * 512
    if needed > (free or 0):
        raise HeldBack(f'no room: {show_size(needed)} are needed at {quoted(folder)}, '
                       f'{show_size(free or 0)} are free')


def delete_data(data: OwnData) -> None:
    """Delete those files of data that have not changed, then the folders that are empty.

    Raises LoggableError where the system refuses to, or the disk is not there.
    """
    above, refused, log = os.path.dirname(data.root), '', logging.getLogger('torque.data')
    there = identity(above)
    gone = data.files and not any(os.path.lexists(file.path) for file in data.files)
    if there is None or gone and there[0] != data.files[0].device:
        raise LoggableError(f'the disk of {quoted(data.root)} is not mounted')
    for file in data.files:
        folder, name = os.path.split(file.path)
        handle = None
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            led = os.path.realpath(folder) != os.path.realpath(above) + folder[len(above):]
            if not led and file.is_same(os.stat(name, dir_fd=handle, follow_symlinks=False)):
                os.unlink(name, dir_fd=handle)
            else:
                log.warning('%s stays: it was changed meanwhile', quoted(file.path))
        except OSError as error:
            if error.errno not in NOT_THERE:
                refused = str(error.strerror)
        finally:
            if handle is not None:
                os.close(handle)
    for folder in data.folders:
        with contextlib.suppress(OSError):      # something else is in it
            os.rmdir(folder)
    if refused:
        raise LoggableError(f'not all data at {quoted(data.root)} is deleted: {refused}')
    for folder in data.folders:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                log.info('%s stays: other files are in it, such as %s', quoted(folder),
                         quoted(name))
                return


class Removal:
    """A note of what is going to be removed, and of how far that has come, as JSON.

    It is on the disk before anything changes, and goes last.
    """

    def __init__(self, path, engine: Engine, facts: dict[str, Any]):
        self.path, self.engine, self.facts = path, engine, facts
        files = [OwnFile(*file) for file in facts['files']]
        self.data = OwnData(facts['root'], files, facts['folders'])

    def __str__(self) -> str:
        return f"{quoted(self.facts['name'])} {self.facts['hash']}"

    @classmethod
    def begin(cls, folder, item: Item, data: OwnData, **facts) -> Removal:
        """Write a note. Raises LoggableError where there is one for the same item."""
        path = os.path.join(folder, NOTE + item.hash)
        if os.path.lexists(path):
            raise LoggableError(f'a removal was cut short; {path} tells of it')
        for name in NOTED:
            facts[name] = getattr(item, name)
        facts.update(data._asdict(), engine=item.engine.address.where)
        removal = cls(path, item.engine, facts)
        removal.mark()
        return removal

    def mark(self, **facts):
        """Note more, which is on the disk when this returns."""
        self.facts.update(facts)
        replace_file(self.path, json.dumps(self.facts))

    def copies(self) -> OwnData:
        """Return the data of a Move at the new place; without files before they are there.

        All its folders are torque's own, of any name.
        """
        files = [OwnFile(*file) for file in self.facts.get('copies', ())]
        copies = moved(self.data, self.facts['new'])
        return OwnData(copies.root, files, [*copies.folders, copies.root])

    def has_item(self) -> bool | None:
        """Tell whether rTorrent has its item; None where its session is another."""
        return has_item(self.engine, self.facts['hash'], self.facts['session'])

    def item(self) -> Item:
        """Return its item as it is now, but with the state that it had."""
        state = {name: self.facts[name] for name in ('state', 'is_open', 'is_active')}
        return ask_item(self.engine, self.facts['hash'])._replace(**state)

    def drop(self):
        """Remove the note: all is done, or nothing is to be done."""
        with contextlib.suppress(OSError):
            os.remove(self.path)
            sync(os.path.dirname(self.path))


def read_removal(path, engine: Engine) -> Removal:
    """Return a note that was left; raises ValueError and the like where it is none."""
    with open(path, encoding='utf-8', opener=open_own) as stream:
        if os.fstat(stream.fileno()).st_uid != os.geteuid():
            raise ValueError('it belongs to another user')
        removal = Removal(path, engine, json.load(stream))
    missing = {*NOTED} - {*removal.facts}
    if missing:
        raise ValueError(f"it lacks {' '.join(sorted(missing))}")
    return removal


def left_removals(folder: str, engine: Engine) -> Iterator[Removal]:
    """Give the notes of an rTorrent that ended runs have left."""
    names = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = sorted(os.listdir(folder))
    for name in names:
        path = os.path.join(folder, name)
        if not name.startswith(NOTE):
            continue
        if name.endswith('.new'):       # of a note that a crash has kept from being written
            os.remove(path)
            continue
        try:
            removal = read_removal(path, engine)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logging.getLogger('torque.data').warning('%s is no note of a removal: %s', path,
                                                     error_text(error))
            continue
        if removal.facts['engine'] == engine.address.where:
            yield removal


def why_keep(removal: Removal, engines: list[Engine]) -> str:
    """Return why the data of a note that was left is kept, '' where it is to go.

    It goes where its item was erased for sure, and nobody uses the data by now.
    """
    facts, there = removal.facts, removal.has_item()
    if there is None:
        return 'that was another rTorrent'
    if there:
        return 'its item is there'
    if 'asked' not in facts:
        return 'it had not begun'
    if 'erased' not in facts and removal.engine.ask([('view.size', '', 'default')]) == [0]:
        return 'rTorrent has no items at all'
    if not facts['shared']:
        for path in Users(engines).of(removal.data).values():
            return f'another item uses {quoted(path)}'
    return ''


class PromisedSpace:
    """Bytes of each disk that deleting should have freed and that have not appeared yet.

    Snapshots and open files keep them. A file remembers, for a week at most.
    """
    KEPT = 7 * 86400                    # seconds

    def __init__(self, path):
        self.path = path
        self.disks = {}                 # device -> bytes, free bytes then, Unix seconds
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, OverflowError), \
                open(path, encoding='utf-8') as stream:
            for device, (promised, free, since) in json.load(stream).items():
                self.disks[device] = int(promised), int(free), int(since)

    def update(self, path, freed: int = 0) -> int | None:
        """Promise so many more bytes to the disk of a path, and look what has appeared there.

        Returns its free bytes with those that are owed; None where they are not known.
        """
        device, free = disk_of(path)
        if device is None or free is None:
            return None
        promised, before, since = self.disks.get(str(device), (0, free, 0))
        if not 0 <= time.time() - since < self.KEPT:
            promised = 0
        owed = max(promised - max(free - before, 0), 0) + freed
        if freed:
            since = int(time.time())
        self.disks[str(device)] = owed, free, since
        return free + owed

    def save(self):
        """Keep this for later runs and processes."""
        replace_file(self.path, json.dumps(self.disks))


# --- Template --------------------------------------------------------------------------------
# Text with {{expressions}} and {{if}} ... {{endif}} enters, and values by name; text leaves,
# commands of rTorrent, or the arguments of a program. What an expression gives is data: the text
# around it is split into arguments first, with a mark for each value. A mistake is found when the
# template is made, and is shown with `<-- here` after its place. Pure functions, for any thread.

# What is not closed goes on to the end, so that looking for tags takes linear time.
TAG = re.compile(r'(\{\{.*?(?:\}\}|\Z)|\{%.*?(?:%\}|\Z)|\{#.*?(?:#\}|\Z))', re.S)
BRANCH = re.compile(r'(if|elif)\b(.*)|(else|endif)', re.S)
# A name in one pair of braces, unless it is ${name}; beside {{name}} there is none in plain text
ONE_BRACE = re.compile(r'(?<!\$)\{\s?(?:item\.)?(\w{1,99})[^{}]{0,99}\}')
ELSE = ast.Constant(True)               # the condition of an else
MOST_EXPRESSION = 300                   # characters
# Stand for a value while the text around it is split: MARK, and a character for each value, of
# those that Unicode leaves to private use
MARK, FIRST_VALUE = '\0', 0xF0000
COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge}
# What an expression may raise over what it does not fit
MISFITS = (AttributeError, KeyError, OSError, OverflowError, RecursionError, TypeError, ValueError)


def show(value):
    """Return a value as text: None is nothing, yes is 1, tags stand side by side."""
    if value is None:
        return ''
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, set):
        value = sorted(value)
    if isinstance(value, list):
        return ' '.join(map(show, value))
    return str(value)


def part_of(value, name, other=None):
    """Return a named part of a mapping."""
    if value is None:
        return other
    return value.get(name, other)


def stem_of(path):
    """Return the name of a file without folder and extension."""
    return os.path.splitext(os.path.basename(path))[0]


def show_time(when):
    """Return local date and time of Unix seconds, nothing for an unknown time."""
    if not when:
        return ''
    return time.strftime('%F %T', time.localtime(when))


def value_or(value, other=''):
    """Return a value, or another where it is empty; 0 is not."""
    if value or value == 0:
        return value
    return other


TEXT_FILTERS: dict[str, Callable] = {
    'lower': str.lower,
    'upper': str.upper,
    'title': str.title,
    'replace': str.replace,
    'basename': os.path.basename,
    'pathbase': os.path.basename,       # as pyrocore calls it
    'dirname': os.path.dirname,
    'pathdir': os.path.dirname,
    'stem': stem_of,
    'pathname': stem_of}
FILTERS: dict[str, Callable] = {
    **TEXT_FILTERS,                     # the others take values as they are
    'size': show_size,
    'sz': show_size,
    'duration': show_duration,
    'date': show_time,
    'iso': show_time,
    'default': value_or,
    'get': part_of}
FILTER_ARGUMENTS = {                    # how many they take; the others none
    'replace': (2,),
    'get': (1, 2),
    'default': (0, 1)}


def compares(op, one, other):
    """Tell whether a comparison holds; what cannot be compared does not."""
    try:
        if isinstance(op, (ast.In, ast.NotIn)):
            return (one in other) is isinstance(op, ast.In)
        return bool(COMPARE[type(op)](one, other))
    except TypeError:
        return isinstance(op, ast.NotIn)


def apply_filter(node, values):
    """Return what a|filter, a|filter(x), a|h.filter or a.filter(x) gives."""
    operands = []
    call = node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        operands, call = [node.left], node.right
    if isinstance(call, ast.Call) and not call.keywords:
        operands += call.args
        call = call.func
    if isinstance(node, ast.Call) and isinstance(call, ast.Attribute):
        operands.insert(0, call.value)
    # of an ast.Name, or of an ast.Attribute
    name = getattr(call, 'id', getattr(call, 'attr', ''))
    if not operands or name not in FILTERS:
        raise UserError(f'{name or type(node).__name__} is not possible; allowed are names, '
                        f'literals, and or not in, comparisons, | with {" ".join(FILTERS)}')
    if len(operands) - 1 not in FILTER_ARGUMENTS.get(name, (0,)):
        raise UserError(f"{name} does not take {counted(len(operands) - 1, 'argument')}")
    operands = [evaluate(operand, values) for operand in operands]
    # What is not known stays so, till default gives something in its place.
    if operands[0] is None and name not in ('default', 'get'):
        return None
    if name in TEXT_FILTERS:
        operands = [show(operand) for operand in operands]
    return FILTERS[name](*operands)


def evaluate(node, values):
    """Return what an expression gives; a name without a value is a KeyError.

    Allowed are names, a.b of mappings, literals, and or not, comparisons, a|filter(x), and the
    filters as methods, a.replace('.', ' '). Nothing reaches an object of Python. All parts are
    evaluated, so that one call with an empty defaultdict meets all mistakes and all names.
    """
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.Attribute) and not node.attr.startswith('_'):
        # pyrocore's templates call the torrent so; its fields are the names of the values.
        if isinstance(node.value, ast.Name) and node.value.id in ('item', 'd', 'i'):
            return values[node.attr]
        return part_of(evaluate(node.value, values), node.attr)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not evaluate(node.operand, values)
    if isinstance(node, (ast.Constant, ast.UnaryOp, ast.Tuple, ast.List)):
        return ast.literal_eval(node)
    if isinstance(node, ast.BoolOp):
        parts = [evaluate(part, values) for part in node.values]
        for part in parts:
            if bool(part) is isinstance(node.op, ast.Or):
                break
        return part
    if isinstance(node, ast.Compare):
        parts = [evaluate(part, values) for part in [node.left, *node.comparators]]
        return all(map(compares, node.ops, parts, parts[1:]))
    return apply_filter(node, values)


def nth_branch(number, branches):
    """Return the nodes of the branch of a number; none where there is no such branch."""
    for _, nodes in branches[number:number + 1]:
        return nodes
    return []


def true_branch(values, branches):
    """Return the nodes of the first branch whose condition holds."""
    for test, nodes in branches:
        if evaluate(test, values):
            return nodes
    return []


def flat(nodes, choose):
    """Return the text of nodes, and of those that are chosen from the branches of an if."""
    text = ''
    for node in nodes:
        if not isinstance(node, str):
            node = flat(choose(node), choose)
        text += node
    return text


class Template:
    """Text with {{expression}}, {{if}} ... {{endif}} and {{# comment }}.

    known: the names there will be, where that is known; others are refused. `names` are those
    it needs: item.name is `name`.

    >>> Template('{{if ratio > 1}}{{item.name|upper}}{{endif}}').render({'ratio': 2, 'name': 'a'})
    'A'
    """

    called: frozenset = frozenset()     # commands of rTorrent in it

    def __init__(self, text, known=None):
        self.text, self.known = text, known
        # Each is a text, the mark of an expression, or of an if [(ast, nodes), ...].
        self.nodes: list = []
        self.expressions = {}           # number of the character that stands for it -> ast
        self.open_ifs = []              # an if, and the nodes that it is among
        self.at = 0                     # end of the piece in hand
        self.most_branches = 0          # of one if
        self.seen: dict = collections.defaultdict(lambda: None)
        try:
            self.parse(text)
            # Each branch is divided once, and the text without any: a mistake in a branch that is
            # seldom taken is found now. At render() the text is divided, and checked, again.
            for number in range(self.most_branches + 1):
                self.divide(flat(self.nodes, functools.partial(nth_branch, number)))
        except UserError as error:
            raise mistake('template', text, self.at, error) from None
        self.names = tuple(self.seen)

    def parse(self, text):
        """Make nodes of a text."""
        if MARK in text:
            raise UserError('a NUL is not possible')
        nodes = self.nodes
        for piece in TAG.split(text):
            self.at += len(piece)
            if not TAG.fullmatch(piece):
                self.check_braces(piece)
                nodes.append(piece)
            elif piece[-2:] not in ('}}', '%}', '#}'):
                raise UserError('a {{, {% or {# in this is not closed')
            elif '#' not in piece[1:3]:
                nodes = self.add_tag(nodes, piece[2:-2].strip())
        if self.open_ifs:
            raise UserError('an if has no endif')

    def check_braces(self, text):
        """Refuse a {name} in plain text that is meant as a {{name}}."""
        for slip in ONE_BRACE.finditer(text):
            if slip[1] in (self.known or TORRENT_FIELDS):
                raise UserError(f'{slip[0]} is plain text; write {{{slip[0]}}}')

    def add_tag(self, nodes, code):
        """Add what a tag says; return the nodes that what follows is to be among."""
        branch = BRANCH.fullmatch(code.strip('-: \t\r\n'))
        if not branch:
            number = FIRST_VALUE + len(self.expressions)
            self.expressions[number] = self.expression(code)
            nodes.append(MARK + chr(number))
            return nodes
        word = branch[1] or branch[3]
        if word == 'if':
            nodes.append([])
            self.open_ifs.append((nodes[-1], nodes))
        if not 0 < len(self.open_ifs) <= MOST_DEPTH:
            raise UserError(f'{word} without if, or too deep; allowed are {MOST_DEPTH} in another')
        branches, around = self.open_ifs[-1]
        if word == 'endif':
            self.open_ifs.pop()
            return around
        if branches and branches[-1][0] is ELSE:
            raise UserError(f'{word} after else')
        test: ast.AST = ELSE
        if word != 'else':
            test = self.expression(branch[2].strip())
        branches.append((test, []))
        self.most_branches = max(self.most_branches, len(branches))
        return branches[-1][1]

    def expression(self, code):
        """Return the ast of an expression whose parts and names are allowed."""
        try:
            if len(code) > MOST_EXPRESSION:
                raise ValueError('too long')
            tree = ast.parse(code, mode='eval').body
            evaluate(tree, self.seen)
        # The parser itself fails over deep nesting and NULs, each Python in its own way.
        except (*MISFITS, SyntaxError, MemoryError, Warning):
            raise UserError(f'{quoted(code, 60)} is no expression; allowed are e.g. label, '
                            "label|default('x'), 'TV' in flags and not is_private") from None
        for name in self.seen:
            if self.known and name not in self.known:
                raise UserError(f'there is no {quoted(name)} here{nearest(name, self.known)}')
        return tree

    def divide(self, text):
        """Return what the text is split into before the values are put in."""
        return [text]

    def divided(self, values) -> tuple[list, dict[int, str]]:
        """Return what the text is divided into, and the values, for str.translate()."""
        shown = {ord(MARK): ''}
        try:
            text = flat(self.nodes, functools.partial(true_branch, values))
            for number, tree in self.expressions.items():
                if chr(number) in text:
                    shown[number] = show(evaluate(tree, values))
        except MISFITS as error:
            raise LoggableError(f'template {quoted(self.text, 80)}: {error!r}') from None
        # rTorrent 0.9.8 drops what stands behind it: /srv/..{NUL}x would lead out of /srv
        if any('\0' in value for value in shown.values()):
            raise HeldBack(f'template {quoted(self.text, 80)}: a value holds a NUL')
        return self.divide(text), shown

    def put_in(self, text, shown: dict[int, str]):
        """Return a text with values put in; none leads out of the folder that stands before it."""
        for part in text.split('/')[1:]:
            value = part.translate(shown)
            if MARK in part and '..' in value.split('/'):
                raise HeldBack(f'template {quoted(self.text, 80)}: {quoted(value)} would lead '
                               'out of the folder that it is put in')
        return text.translate(shown)

    def render(self, values):
        """Return the text, values put in; LoggableError where one is missing, or leads astray."""
        (text,), shown = self.divided(values)
        return self.put_in(text, shown)


# What may be run with a value in it. A list of programs cannot be complete, so what stands beside a
# value decides first, then the flag before it, then the program.
SAFE_WAY = """allowed is sh -c '... "$1"' sh {{name}}"""
SHELL_TEXT = re.compile(r"""["'`;|&$()<>{}\\\r\n]""")
TEXT_FLAG = '(?:-[A-Za-z0-9]{0,2}[ceErpS]|--(?:command|eval|exec|execute|expression|print|run))'
TEXT_FOLLOWS = re.compile(TEXT_FLAG)
TEXT_ATTACHED = re.compile(rf'{TEXT_FLAG}(?:=?{MARK}|.*\s)', re.S)
# These give what they are told to a shell, joined by spaces: no value is safe.
RUNS_ALL = frozenset('ssh rsh mosh su watch xargs tmux screen parallel at batch'.split())
# These run the first word that is nothing of theirs, or what stands after a flag ...
RUNNERS = frozenset('env sudo doas nice ionice nohup timeout setsid busybox toybox chroot flock '
                    'script runuser'.split())
SHELLS = frozenset('sh bash dash ash zsh ksh mksh lksh pdksh yash posh fish csh tcsh pwsh xonsh '
                   'rbash rksh rzsh'.split())
# ... and these, as shells do, leave to that program what stands after it; sed does not.
INTERPRETERS = SHELLS.union('python pypy perl ruby node nodejs deno bun php lua luajit tclsh wish '
                            'expect awk gawk mawk nawk guile Rscript julia groovy sed'.split())
# Of those, flags that no argument follows, unless it is a number
LONE_FLAG = re.compile(
    '--|-[AEHbefiknoqvwx]{1,9}|.*[0-9=].*|--(fork|wait|nonblock|exclusive|shared|close|quiet|verbose|'
    'background|foreground|non-interactive|preserve-env|preserve-status)', re.S)
NUMBER_OR_TIME = re.compile('[0-9.]{1,20}[smhd]?')
ASSIGNMENT = re.compile(r'[A-Za-z_]\w{0,99}=')
# With these, perl opens what follows by an `open` that runs `x|`.
PERL_LOOP = re.compile('-[^-eEImM]*[Fanp]')
# The name of an interpreter, and a flag of it
FLAG_WITH_ARGUMENT = re.compile(
    r'\w+ (?:[-+][A-Za-z]{0,9}[oOWXIdF]|--rcfile|--init-file)|lua(jit)? -l|'
    '(node|nodejs|bun|deno|ruby) (-r|--(require|import|loader|experimental-loader))')
SHELL_FLAG = re.compile('-[A-Za-z]{0,9}[cS][A-Za-z]{0,9}|--(command|split-string)')
SCRIPT_FLAG = re.compile('-[A-Za-z0-9.]{0,9}[ceErpSmfBR][A-Za-z0-9.]{0,9}|--[a-z-]{1,20}')


def check_program(name, words):
    """Refuse a value in what an interpreter, or the like, takes for its program or its flags."""
    gives_text = SHELL_FLAG
    if name in INTERPRETERS - SHELLS:
        gives_text = SCRIPT_FLAG
    # Words till it is known what is run; before that comes a folder, or a lock.
    flag, missing = '', 1
    if name in ('chroot', 'flock'):
        missing = 2
    for word in words:
        is_text = missing > 0 or gives_text.fullmatch(flag)
        # awk -v name={{name}} is data
        is_data = flag == '-v' and name.endswith('awk')
        if name in RUNNERS and not flag and ASSIGNMENT.match(word):
            continue
        loops = name == 'perl' and PERL_LOOP.match(word)
        if MARK in word and is_text and not is_data or loops and MARK in ''.join(words):
            raise UserError(f'a value that a shell or the like would run; {SAFE_WAY}')
        if word.startswith(('-', '+')):
            flag = word
            if name in RUNNERS and LONE_FLAG.fullmatch(word):
                flag = ''
            continue
        if name in RUNNERS:
            # What stands right after a flag may be its argument
            if not flag and not NUMBER_OR_TIME.fullmatch(word):
                missing -= 1
        elif not is_data and not FLAG_WITH_ARGUMENT.fullmatch(f'{name} {flag}'):
            more = name not in SHELLS and gives_text.fullmatch(flag)
            if name != 'sed' and not more:
                return                  # what follows are arguments of its program
            missing = 0
        flag = ''


def check_words(words):
    """Refuse a value inside what a program would run: no quoting is safe there.

    A value stands in a word of its own, or beside plain text.
    """
    if MARK in words[0]:
        raise UserError('the program is missing, or depends on a value')
    # without folder and version
    names = [os.path.basename(word).rstrip('0123456789.-') for word in words]
    for flag, word in zip(['', *words], words):
        if MARK not in word:
            continue
        if SHELL_TEXT.search(word):
            raise UserError(f'a value beside quotes ; | & $ ( < or the like may be run; {SAFE_WAY}')
        follows = TEXT_FOLLOWS.fullmatch(flag) and re.search(r'\s', word)
        if follows or TEXT_ATTACHED.match(word) or not RUNS_ALL.isdisjoint(names):
            raise UserError(f'a value that a shell or the like would run; {SAFE_WAY}')
    for number, name in enumerate(names, 1):
        if name in RUNNERS or name in INTERPRETERS:
            check_program(name, words[number:])
        if name in INTERPRETERS:
            break


# Commands as they were called up to 0.8, in the configurations of that time.
OLD_GET = re.compile(r'\b([dfpt])\.get_(\w{1,99})=')
OLD_SET = re.compile(r'\b([dfpt])\.set_(?!(?:create|resize)_queued=)(\w{1,99})=')
QUOTED_ARGUMENT = re.compile(r'"((?:[^"\\]|\\.)*)"', re.S)


def argument_text(word):
    """Return what an argument of a command says, without its quotes."""
    word = word.strip()
    whole = QUOTED_ARGUMENT.fullmatch(word)
    runs = '"' in word or word.startswith(('(', '{', '\\'))
    if whole:
        word, runs = whole[1], False
    text = re.sub(r'\\(.)', r'\1', word)
    if runs or MARK in text and text.startswith('$'):
        raise UserError('a value beside ( { $ or an open quote; allowed are words and "..."')
    return text


COMMAND = re.compile(r'([A-Za-z_][\w.]*)\s*=(.*)', re.S)
# Commands of an item that are written without their d.
OF_ITEM = re.compile(
    r'(?:try_)?(?:start|stop|close)|open|erase|pause|resume|check_hash|update_priorities|'
    r'delete_tied|save_full_session|tracker_announce|'
    r'(?:custom[1-5]?|directory|directory_base|priority|throttle_name|ignore_commands|'
    r'tied_to_file|message|views)(?:\.(?:set|push_back|push_back_unique|remove))?')
# Commands that take arguments as data; others (multicall, branch ...) run them.
DATA_COMMAND = re.compile(r'[dfpt]\.(?!multicall)[\w.]{1,99}|view\.set_(not_)?visible|print|'
                          r'execute[\w.]{0,99}')
COMMAND_PIECE = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)|\\.|[^",;\n\\]+|.', re.S)
# An f. command that is called; within f.multicall, which says of which file, it is right
LISTING = re.compile(r'"f\.multicall(?:[^"\\]|\\.){0,999}"')
FILELESS = re.compile(r'(?<![\w.:])f\.(?!multicall)[a-z][\w.]{0,99}\s{0,9}=|'
                      r'\(\s{0,9}f\.(?!multicall)')


def split_commands(text, marks) -> list[str]:
    """Return text split at marks that are outside of double quotes."""
    parts = ['']
    for piece in COMMAND_PIECE.findall(text):
        if piece in marks:
            parts.append('')
        else:
            parts[-1] += piece
    return parts


class CommandTemplate(Template):
    r"""Commands of rTorrent, separated by ; or line breaks; one without values stays as it is.

    >>> print(CommandTemplate('d.custom.set=dir,/done/{{a}}').render({'a': 'x "y", z'}))
    d.custom.set="dir","/done/x \"y\", z"
    """

    def divide(self, text):
        """Return (text, nothing) or (`name=`, arguments) of each command, values still marks."""
        commands = [part.strip() for part in split_commands(text, ';\n')]
        return [self.command(part) for part in commands if part]

    def command(self, text) -> tuple[str, list[str]]:
        """Return one command, divided."""
        text = OLD_SET.sub(r'\1.\2.set=', OLD_GET.sub(r'\1.\2=', text))
        command = COMMAND.fullmatch(text)
        if not command:
            raise UserError(f'{quoted(text.replace(MARK, "{{..}}"), 60)} is not a command; '
                            'allowed is name=argument,...')
        name, rest = command.groups()
        if OF_ITEM.fullmatch(name):
            raise UserError(f'd. is missing before {name}; write d.{name}=')
        self.called |= {name}
        if not name.startswith('f.multicall') and FILELESS.search(LISTING.sub('', text)):
            raise UserError('an f. command without a file makes rTorrent abort; allowed is e.g. '
                            'f.multicall=*.nfo,f.priority.set=2')
        # Without a value it is the user's own, and goes to rTorrent as it is written.
        if MARK not in rest:
            return text, []
        if not DATA_COMMAND.fullmatch(name):
            raise UserError(f'{name} might run the value; allowed are e.g. d.custom.set, print')
        words = [argument_text(word) for word in split_commands(rest, ',')]
        if name.startswith('execute'):
            if any(word.startswith('$') for word in words):
                raise UserError('a value with an argument that begins with $, which may become a '
                                'shell; allowed are words and "..."')
            check_words(words)
        return name + '=', words

    def commands(self, values):
        """Return the commands, each fit for load.*; none where all is empty."""
        divided, shown = self.divided(values)
        commands = []
        for name, words in divided:
            arguments = [self.argument(word, shown) for word in words]
            commands.append(name + ','.join(arguments))
        return commands

    def render(self, values):
        """Return the commands as one text, which load.* takes too."""
        return ' ; '.join(self.commands(values))

    def argument(self, word, shown):
        """Return an argument with its values, quoted as a whole.

        rTorrent RUNS one that begins with $, quoted or not; (cat,{"..."}) keeps it as it is (seen
        on 0.9.8 and 0.16.17).
        """
        text = in_quotes(self.put_in(word, shown))
        if MARK in word and text.startswith('"$'):
            return f'(cat,{{{text}}})'
        return text


# A word of a text whose quotes are closed, with its quotes
RAW_WORD = re.compile(r"""(?s)(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^ \t\r\n'"\\])+""")
# Words that only a shell obeys, and the beginnings, up to such a character, of those that it reads
FOR_SHELL = re.compile(r'(?s)(\|\|?|&&?|<<?)|([0-9&]?>>?).*|.*(?<!\\)(;)')
LEFT_ALONE = re.compile(r"""(?s)#(?!})|(?:'[^']*'|\\.|[^'\\])*?(?:\$(?=[\w({])|`)""")


def split_args(text) -> list[str]:
    r"""Return program and arguments, split as a shell would; ~/ is the home folder.

    >>> split_args('echo "a  b" \\; ";"')
    ['echo', 'a  b', ';', ';']
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f'{quoted(text)}: {error}; allowed are words, "..." and \'...\'') from None
    for word in RAW_WORD.findall(text):
        found = FOR_SHELL.fullmatch(word)
        if found:
            raise UserError(f'{found[found.lastindex or 0]} is for a shell; write shell = yes, or '
                            'quote it where it is an argument')
    return [os.path.expanduser(word) for word in words]


class ArgsTemplate(Template):
    """An external command as a list; no shell is involved.

    >>> ArgsTemplate('mv -- {{item.name}} "/old stuff"').render({'name': 'a; b'})
    ['mv', '--', 'a; b', '/old stuff']
    """

    def divide(self, text):
        """Return the arguments, values still marks."""
        words = split_args(text)
        check_words(words or [MARK])
        self.program = words[0]
        return words

    def render(self, values):
        """Return the arguments; LoggableError for a value that would pass for an option."""
        words, shown = self.divided(values)
        args: list[str] = []
        for word in words:
            arg = self.put_in(word, shown)
            # A torrent may be called -rf, or --
            if word.startswith(MARK) and arg.startswith('-') and '--' not in args:
                raise LoggableError(f'{quoted(arg)} would be an option of {quoted(args[0])}; '
                                    'write -- before it')
            args.append(arg)
        return args


# --- Jobs: base and figures ------------------------------------------------------------------
# A job is made from its settings (`config`) and run() is called when it is due. It talks to
# its engine and to nothing above: files, threads and signals are other sections' business.
# Built-in jobs list their options in a table that checks the ini and prints the help. A job is
# made and cleaned up in the main thread; run() is called in a thread of its own, never twice
# at once.

SECRET = '(?i)(?:pass(?:word|wd|phrase)?|secret|token|api.?key)'      # in names of settings


class Settings(dict):
    """Settings by name: config.path or config['path']; as an attribute, None when missing.

    Those of a job are job.NAME.* without that prefix, job_name, dry_run, active ..., and they
    have as attributes alone: `engine` is the job's rTorrent, `engines` are those of all jobs;
    `state_dir` is where it may keep files; `alone`: this is a single run, perhaps beside the
    daemon.
    """

    def __init__(self, settings=(), **attributes):
        super().__init__(settings)
        vars(self).update(attributes)

    def __getattr__(self, name: str):
        # Asked for what is no attribute; copy and pickle look for __names__ that mean something.
        if name.startswith('__'):
            raise AttributeError(name)
        return self.get(name)

    def state_file(self, ending: str) -> str:
        """Return the path of a file that is kept for the job."""
        return os.path.join(self.state_dir, f'{self.job_name}.{ending}'.replace('/', '_'))

    def without_secrets(self) -> dict:
        """Return the settings as they may be shown."""
        shown = dict(self)
        for name, value in shown.items():
            if re.search(SECRET + '$', name) and value:
                shown[name] = '***'
            elif isinstance(value, str):
                shown[name] = redacted(value)
        return shown

    def __repr__(self) -> str:
        return repr(self.without_secrets())


KINDS: dict[Any, str] = {
    parse_bool: 'yes/no',
    parse_count: 'number',
    parse_port: 'number',
    parse_duration: 'time',
    parse_timeout: 'time',
    parse_size: 'size'}


class Option(NamedTuple):
    """An option of a built-in job: how its text is read, its default, a line of help."""
    name: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    alias: str = ''                     # another name of it, as pyrosimple has it

    @property
    def kind(self) -> str:
        """What the option takes, for the help."""
        return KINDS.get(self.parse, 'text')


def parse_condition(text: str) -> Filter | None:
    """Return the Filter of a condition, None for an empty one."""
    if not text.strip():
        return None
    return Filter(text)


def get_class_logger(job) -> logging.Logger:
    """Return the logger of a job: its lines carry the job's name."""
    config = getattr(job, 'config', None)
    name = getattr(config, 'job_name', None) or type(job).__name__
    return logging.getLogger('torque.' + name)


class Unset:
    """Stands for an attribute of a job until Job.__init__() has set it."""

    def __get__(self, job, owner):
        raise AttributeError('config, LOG, engine and dry_run are set by '
                             'super().__init__(config), which this __init__() does not call')


UNSET: Any = Unset()


class Job:
    """What built-in jobs share; a plain class with __init__(config) and run() is a job too."""
    config: Settings = UNSET
    LOG: logging.Logger = UNSET
    engine: Engine = UNSET
    dry_run: bool = UNSET
    options: Any = None                 # None: any option is taken, as the ini has it
    section = ''                        # the ini section that gives options their defaults
    families: tuple[str, ...] = ()      # beginnings of options that may have any name
    at_start = False                    # run at the start, too

    def __init__(self, config: Settings):
        self.config = config
        self.LOG = get_class_logger(self)
        self.engine = config.engine
        self.dry_run = bool(config.dry_run)

    def torrents(self, condition: str = '', fields='', view: str = 'main') -> list[Torrent]:
        """Return the torrents of a view that meet a condition, with the fields it names.

        fields: `size uploaded`, or a list of names. A row reads as torrent.size and as
        torrent['size']; hash and name are always there.
        """
        if isinstance(fields, str):
            fields = fields.replace(',', ' ').split()
        return list_torrents(self.engine, view, fields, parse_condition(condition))

    def risks(self) -> list[str]:
        """Return what to be warned of before it does harm, a line each."""
        return []

    def check(self) -> list[str]:
        """Return what the job needs and does not find, a line each; for --check."""
        return []

    def unknown_commands(self, names) -> list[str]:
        """Return a line for each command that rTorrent does not have, where it answers."""
        methods = self.engine.methods
        if not methods:
            return []
        names = sorted({*names} - methods)
        # Private ones of the rc are not listed, but told.
        bodies = self.engine.ask([('method.get', '', name) for name in names])
        return [f'rTorrent has no command {name!r}{nearest(name, methods)}'
                for name, body in zip(names, bodies) if isinstance(body, RpcError)]

    def outlook(self) -> list[str]:
        """Return what the job is going to do, or leaves alone, a line each; for the page."""
        return []

    def end_run(self):
        """End what a run has started, or keep what it has: it has run out of time."""

    def report(self, text, *args):
        """Log what is worth a line only to who runs the job by hand."""
        level = logging.DEBUG
        if self.config.alone:
            level = logging.INFO
        self.LOG.log(level, text, *args)

    def announce(self, *words) -> bool:
        """Log what is done now, and tell whether to do it: a dry run only says so."""
        text = ' '.join(str(word) for word in words if word)
        if self.dry_run:
            text = 'dry run, not done: ' + text
        self.LOG.info('%s', text)
        return not self.dry_run

    def act(self, method: str, *params):
        """Call a command that changes something in rTorrent; a dry run only says so."""
        if self.dry_run:
            self.announce(method, *map(quoted, params))
            return None
        answer, = without_errors(self.engine.tell([(method, *params)]))
        return answer


def rate_text(way, rate: int | None, limit: int | None):
    """Return a rate and its limit in bytes a second; a limit of 0 is none.

    >>> rate_text('up', 1258291, 2097152), rate_text('down', None, 0)
    ('up 1.2 MiB/s of 2.0 MiB', 'down ?')
    """
    text = f'{way} ?'
    if rate is not None:
        text = f'{way} {show_size(rate)}/s'
    if limit:
        text += f' of {show_size(limit)}'
    return text


class EngineStats(Job):
    """Log a line on rTorrent's state: version, torrents, traffic, speed of its answer."""
    options = ()
    at_start = True                     # so that a new user sees at once whether it answers

    def run(self):
        """Log the line; raises RpcError where rTorrent does not tell."""
        stats = self.engine.stats()
        name = f'{stats.engine_id} rTorrent {stats.version}'
        if stats.uptime is not None:
            name += f' up {show_duration(stats.uptime)}'
        self.LOG.info(
            '%s; %s, %s active; %s, %s; rpc %.1f ms', name,
            counted(value_or(stats.views['main'], '?'), 'torrent'),
            value_or(stats.views['active'], '?'),
            rate_text('up', stats.up_rate, stats.up_limit),
            rate_text('down', stats.down_rate, stats.down_limit), stats.rpc_time * 1000)


def parse_pairs(text) -> dict[str, str]:
    """Return what stands in `name=value, name=value`."""
    pairs = {}
    for part in filter(str.strip, text.split(',')):
        name, _, value = map(str.strip, part.partition('='))
        # It is not shown: it may be a password.
        if not name or not value:
            raise UserError('is not understood; allowed is name=value, name=value')
        pairs[name] = value
    return pairs


def parse_web_url(text):
    """Return the URL of a web server, without the slash at its end."""
    if not re.fullmatch(r'https?://(?:[\w.-]+|\[[\da-fA-F:]+\])(?::\d+)?(?:[/?]\S*)?', text):
        raise UserError(f'{redacted(text)!r} is no web address; allowed is http(s)://host:port/, '
                        'without user and password')
    return text.rstrip('/')


def parse_base_url(text):
    """Return the URL of an InfluxDB, below which its interface begins."""
    base = re.sub(r'[?#].*|(?<!/)/(?:write|query|orgs|api/v\d)(?![\w.-]).*', '', text)
    url = parse_web_url(base)
    # It is not shown: it may hold a password.
    if base != text:
        raise UserError(f'is more than the base URL; write {url}, and dbname, org, bucket, user '
                        '... for the rest')
    return url


def parse_ping_url(text):
    """Return the URL of a monitor, or nothing."""
    return text and parse_web_url(text)


def parse_word(known, text):
    """Return a word that has to be one of those known."""
    if text not in known:
        raise UserError(f"{text!r} is not known; allowed are {' '.join(filter(None, known))}"
                        f'{nearest(text, known)}')
    return text


def parse_token(text, where=''):
    """Return a token that can stand in a header; what is wrong with it is not shown."""
    if not re.fullmatch('[!-~]*', text):
        raise UserError(f'{where}holds a blank, a line break or another character that no token '
                        'has')
    return text


def parse_series(text):
    """Return the name of a series."""
    if text.startswith('#'):
        raise UserError(f'{text!r} would begin a comment of line protocol; another name will do')
    return text


def escape_key(text):
    """Return the name of a series or field, or a tag, for line protocol."""
    return re.sub(r'([,= ])', r'\\\1', re.sub(r'[\x00-\x1f\\]+', ' ', str(text)).strip())


def field_text(value):
    """Return the value of a field as its type is written in line protocol."""
    if isinstance(value, (bool, float)):
        return str(value)
    if isinstance(value, int):
        return f'{value}i'
    text = re.sub(r'[\x00-\x1f]', ' ', str(value))
    return '"' + re.sub(r'(["\\])', r'\\\1', text) + '"'


def influx_line(series, tags, fields, when):
    """Return a point in line protocol, with milliseconds; fields that are None are left out.

    >>> influx_line('s', {'a b': 'c,d'}, {'n': 1, 'x': 0.5, 't': 'y"', 'z': None}, 2)
    's,a\\\\ b=c\\\\,d n=1i,x=0.5,t="y\\\\"" 2000'
    """
    head = escape_key(series)
    for name, tag in sorted(tags.items()):
        # An empty one would spoil the line.
        if escape_key(tag):
            head += f',{escape_key(name)}={escape_key(tag)}'
    values = ','.join(f'{escape_key(name)}={field_text(value)}' for name, value in fields.items()
                      if value is not None)
    return f'{head} {values} {int(when * 1000)}'


def by_series(lines) -> dict[str, list[str]]:
    """Return the lines of each series."""
    groups: dict = {}
    for line in lines:
        series = re.split(r'(?<!\\)[, ]', line, maxsplit=1)[0]
        groups.setdefault(series, []).append(line)
    return groups


def proc_rows(name) -> dict[str, list[str]]:
    """Return the words behind each `name:` of a file of /proc; none where it is not there."""
    rows = {}
    with contextlib.suppress(OSError), open(f'/proc/{name}', encoding='ascii') as stream:
        for line in stream:
            key, _, words = line.partition(':')
            rows[key.strip()] = words.split()
    return rows


MEMORY_FIGURES = {                      # of InfluxDB, and the rows of /proc/meminfo, in kB
    'memory_total': 'MemTotal',
    'memory_available': 'MemAvailable',
    'swap_total': 'SwapTotal',
    'swap_free': 'SwapFree'}


def host_figures() -> dict:
    """Return load, memory in bytes, and network bytes of this machine, where /proc has them."""
    figures: Any = collections.Counter()
    with contextlib.suppress(OSError):
        figures['load1'], figures['load5'], figures['load15'] = os.getloadavg()
    memory = proc_rows('meminfo')
    for name, key in MEMORY_FIGURES.items():
        if key in memory:
            figures[name] = int(memory[key][0]) * 1024
    rows = proc_rows('net/dev')
    # What goes through a bridge or a tunnel goes through a device, too.
    names = [name for name in rows if os.path.exists(f'/sys/class/net/{name}/device')]
    for name in names or rows.keys() - {'lo'}:
        words = rows[name]
        # The heads of the table have fewer.
        if len(words) > 8:
            figures['net_received'] += int(words[0])
            figures['net_sent'] += int(words[8])
    return figures


def disk_figures(path) -> dict:
    """Return the size and the free bytes of the disk of a path."""
    import shutil
    try:
        disk = shutil.disk_usage(os.path.expanduser(path))
    except OSError as error:
        raise LoggableError(f'disk_path {path!r}: {error.strerror}') from None
    return {'disk_total': disk.total, 'disk_free': disk.free}


def read_secret(path):
    """Return the first line of a file that holds a password or token; '' for no file."""
    if not path:
        return ''
    try:
        with open(os.path.expanduser(path), encoding='utf-8', errors='replace') as stream:
            return stream.readline().strip()
    except OSError as error:
        raise LoggableError(f'{path}: {error.strerror}') from None


def server_message(answer: HttpAnswer):
    """Return what a server says, without the JSON that InfluxDB wraps it in."""
    text = answer.body[:5000].decode('utf-8', 'replace').strip()
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        told = json.loads(text)
        text = told.get('error') or told.get('message') or text
    return one_line(f'HTTP {answer.status} {answer.reason} ') + quoted(text, 1000)


# By version of the interface: where points are written to, and how a token is called.
WRITE = {
    '1': ('/write?db={db}&precision=ms', 'Token'),
    '2': ('/api/v2/write?org={org}&bucket={bucket}&precision=ms', 'Token'),
    '3': ('/api/v3/write_lp?db={db}&precision=millisecond', 'Bearer')}


class InfluxDB(Job):
    """Push figures of rTorrent and of the host to InfluxDB, or what speaks its line protocol."""
    section = 'INFLUXDB'
    options = (
        Option('url', parse_base_url, 'http://localhost:8086', 'base URL of the server'),
        Option('user', str, '', 'account (1.x)'),
        Option('password', str, '', 'password of that account'),
        Option('password_file', str, '', 'file that holds the password'),
        Option('token', parse_token, '', 'API token (2.x, 3.x)'),
        Option('token_file', str, '', 'file that holds the token'),
        Option('org', str, '', 'organization (2.x)'),
        Option('bucket', str, '', 'bucket (2.x); left out, dbname'),
        Option('api', functools.partial(parse_word, ('', *WRITE)), '',
               '1, 2 or 3; left out, 2 where org or bucket is set, else 1'),
        Option('timeout', parse_timeout, '10s', 'most time for one request'),
        Option('gzip', parse_bool, 'no', 'compress what is sent'),
        Option('dbname', str, 'torque', 'database (1.x, 3.x)'),
        Option('series', parse_series, 'rtorrent',
               'series for rTorrent, and <series>_views; or empty'),
        Option('series_host', parse_series, 'host', 'series for host data; empty for none'),
        Option('disk_path', str, '~', 'paths whose disks are measured, separated by :'),
        Option('tags', parse_pairs, '', 'tags for every point: name=value, name=value'),
        Option('buffer', parse_count, '10000', 'most points kept while the server is away'))
    BATCH = 5000                        # lines in one request
    SAVE_EVERY = 60                     # seconds

    def __init__(self, config):
        super().__init__(config)
        if not config.series and not config.series_host:
            raise UserError('series_host is empty as well: nothing to push', option='series')
        self.points = []                # not delivered yet
        self.retry_at = 0.0             # elapsed seconds: the server has asked to wait until then
        self.file = ''
        self.buffer = 0
        self.saved_at = 0.0
        self.problems: list[LoggableError] = []         # what cannot be measured, in this run
        if not config.alone and not self.dry_run:
            self.buffer = config.buffer
            self.file = config.state_file('points')
            with contextlib.suppress(FileNotFoundError), \
                    open(self.file, encoding='utf-8', errors='replace') as stream:
                self.points = [line.rstrip('\n') for line in stream]

    def cleanup(self):
        """Keep undelivered points for the next process, or remove what was kept."""
        self.saved_at = elapsed_time()
        if self.file and self.points:
            replace_file(self.file, '\n'.join(self.points) + '\n')
        elif os.path.exists(self.file):
            os.remove(self.file)

    def end_run(self):
        """Keep what the run, which may still be at it, has not delivered."""
        self.cleanup()

    def run(self):
        """Measure, and deliver all that waits; raises what kept points from being had or sent."""
        now, lines = time.time(), []
        self.problems = []
        for series, tags, figures in self.measure():
            if set(figures.values()) != {None}:
                lines.append(influx_line(series, {**tags, **self.config.tags}, figures, now))
        if self.dry_run:
            self.announce('sending to', self.config.url, ' | '.join(lines))
        else:
            self.points += lines
            try:
                self.deliver()
            finally:
                if not self.points or elapsed_time() - self.saved_at >= self.SAVE_EVERY:
                    self.cleanup()
        if self.problems:
            raise self.problems[0]

    @contextlib.contextmanager
    def measuring(self):
        """Note what keeps figures away, for the end of the run."""
        try:
            yield
        except LoggableError as error:
            self.problems.append(error)

    def measure(self):
        """Give (series, tags, figures) of rTorrent, of its views, of the host and its disks."""
        config, host = self.config, socket.gethostname()
        if config.series:
            with self.measuring():
                figures = self.engine.stats()._asdict()
                views = figures.pop('views')
                tags = {'host': figures['engine_id'].partition(':')[0]}
                yield config.series, tags, figures
                yield config.series + '_views', tags, views
        if config.series_host:
            yield config.series_host, {'host': host}, host_figures()
            for path in filter(None, config.disk_path.split(os.pathsep)):
                with self.measuring():
                    yield config.series_host, {'disk': path, 'host': host}, disk_figures(path)

    def deliver(self):
        """Send points, oldest first; LoggableError says why some wait, or were refused for good."""
        problems, points = [], self.points
        count = len(points)
        try:
            if elapsed_time() < self.retry_at:
                raise LoggableError('the server has asked to wait')
            while points:
                problems += self.post(points[:self.BATCH])
                del points[:self.BATCH]
        except LoggableError as error:
            lost = max(len(points) - self.buffer, 0)
            del points[:lost]
            kept = counted(len(points), 'point')
            problems.append(f'{error}; {kept} kept, {lost} dropped')
        if problems:
            raise LoggableError(f"{self.config.url}: {', '.join(problems)}")
        self.report('%s sent', counted(count, 'point'))

    def post(self, lines) -> list[str]:
        """Write points, in parts where the server wants that; return what it refused for good.

        Raises LoggableError when they have to be kept.
        """
        answer = self.request('\n'.join(lines).encode())
        if answer.status in (200, 204):
            return []
        said = server_message(answer)
        if answer.status == 413 and len(lines) > 1:
            half = len(lines) // 2
            return self.post(lines[:half]) + self.post(lines[half:])
        if 'database not found' in said:
            make = f'CREATE DATABASE "{self.config.dbname}"'
            raise LoggableError(f'{said}; to make it: influx -execute {make!r}')
        # Some give 500 for fields of another type.
        if answer.status not in (400, 422) and 'field type conflict' not in said:
            # 413 for a single point, too: it would refuse all of them.
            after = answer.headers.get('Retry-After', '')
            if re.fullmatch('[0-9]{1,9}', after):
                self.retry_at = elapsed_time() + min(int(after), 3600)
            raise LoggableError(said)
        groups = by_series(lines)
        if len(groups) == 1:
            return [f"{counted(len(lines), 'point')} of {min(groups)} refused and dropped: {said}"]
        refused = []
        # One bad series must not cost the others.
        for group in groups.values():
            refused += self.post(group)
        return refused

    def request(self, body):
        """Return the server's answer to points in line protocol."""
        from urllib.parse import quote_plus
        config = self.config
        api = config.api or '1'
        if not config.api and (config.org or config.bucket):
            api = '2'
        path, scheme = WRITE[api]
        path = path.format(db=quote_plus(config.dbname), org=quote_plus(config.org),
                           bucket=quote_plus(config.bucket or config.dbname))
        headers = {'Content-Type': 'text/plain; charset=utf-8', **self.login(scheme)}
        if config.gzip:
            import gzip
            body = gzip.compress(body)
            headers['Content-Encoding'] = 'gzip'
        return http_post(config.url + path, body, headers, config.timeout)

    def login(self, scheme) -> dict[str, str]:
        """Return the header that says who writes: a token, else user and password, else none."""
        config = self.config
        file = config.token_file
        token = config.token or parse_token(read_secret(file), f'token_file {file}: line 1 ')
        if token:
            return {'Authorization': f'{scheme} {token}'}
        if not config.user:
            return {}
        password = config.password or read_secret(config.password_file)
        login = binascii.b2a_base64(f'{config.user}:{password}'.encode(), newline=False)
        return {'Authorization': f'Basic {login.decode()}'}


# --- Jobs: torrents --------------------------------------------------------------------------
# What a user wants done with torrents enters as options; what leaves are commands to rTorrent,
# files that come, move or go, and programs that run, each announced in the log and only
# announced in a dry run. A Choice handles the torrents of a view that meet a condition.

def parse_sort(text):
    """Return (field, reversed) of each key in `-prio, loaded, name`."""
    words = text.replace(',', ' ').split()
    keys = [(word.lstrip('-'), word.startswith('-')) for word in words]
    for name, _ in keys:
        torrent_field(name)
    return keys


@contextlib.contextmanager
def naming(option):
    """Let a mistake found in here say of which option it is."""
    try:
        yield
    except UserError as error:
        error.option = option
        raise


def sort_key(name, torrent) -> tuple:
    """Return what a torrent is sorted by: numbers come before texts."""
    value = torrent[name]
    text = str(value).strip()
    if torrent_field(name).kind in COMPARED_AS and PLAIN_NUMBER.fullmatch(text):
        value = float(text)
    return isinstance(value, str), value


def in_order(torrents, keys):
    """Return torrents sorted by the keys; those of which one is not known come last."""
    for name, backwards in reversed(keys):
        unknown: tuple = (None,)
        kind = torrent_field(name).kind
        if kind == 'time':
            unknown = (None, 0)
        elif kind in COMPARED_AS:
            unknown = (None, '')
        known = [torrent for torrent in torrents if torrent[name] not in unknown]
        rest = [torrent for torrent in torrents if torrent[name] in unknown]
        known.sort(key=functools.partial(sort_key, name), reverse=backwards)
        torrents = known + rest
    return torrents


class Choice(Job):
    """What jobs share that handle the torrents of a view that meet a condition."""
    options: Any = (
        Option('view', str, 'main', 'view of rTorrent that is looked at'),
        Option('matcher', parse_condition, '', 'condition that a torrent must meet'),
        Option('sort', parse_sort, 'name, hash', 'fields that give the order; - reverses'))
    fields: tuple = ()                  # what the job needs to know of a torrent, too
    called: frozenset = frozenset()     # commands of rTorrent in its templates
    removes = False                     # does it touch data?
    FRESH = 1.0                         # seconds that a list may be old
    SHOWN = 5                           # torrents that are left alone, on the page
    PATIENCE = 30.0                     # seconds to wait for another run that deletes or moves

    def __init__(self, config):
        super().__init__(config)
        if not config.matcher:
            raise UserError('is not set; for all torrents write matcher = *', option='matcher')
        self.failures: list[Exception] = []     # of torrents, in this run
        # For the page, a text for each torrent of this run; '' where it shows only how many
        self.left_alone = []
        self.held = {}                  # kind of reason -> reason and torrents, in this run
        self.repeats = Repeats()

    def use(self, option, make, text):
        """Return the template that is made of an option, and have known what it needs."""
        with naming(option):
            template = make(text)
            for name in template.names:
                torrent_field(name)
        self.fields += template.names
        self.called |= template.called
        return template

    def chosen(self):
        """Return the torrents that meet the condition, in order."""
        config = self.config
        names = [*self.fields, *dict(config.sort)]
        torrents = list_torrents(self.engine, config.view or 'main', names, config.matcher)
        return in_order(torrents, config.sort)

    def check(self):
        config, views = self.config, self.engine.views
        view, missing = config.viewname or config.view, super().check()
        if view and views and view not in views:
            missing.append(f'rTorrent has no view {view!r}{nearest(view, views)}')
        fields = [*self.fields, *config.matcher.fields, *dict(config.sort)]
        needs = sum([torrent_field(name).needs for name in fields], ())
        columns = [need.partition('=')[0] for need in needs if need.startswith('d.')]
        return missing + self.unknown_commands([*self.called, *columns])

    def engines(self) -> list[Engine]:
        """Return all rTorrents of the configuration, that of the job among them."""
        return [self.engine, *(self.config.engines or ())]

    def data_lock(self):
        """Hold what lets one run at a time delete or move; others have no need of it."""
        if self.dry_run or not self.removes:
            return contextlib.nullcontext()
        return locked(os.path.join(self.config.state_dir, 'data.lock'), self.PATIENCE)

    def hold_back(self, torrents, why: HeldBack):
        """Note which torrents are left alone for now; a dry run logs each."""
        level = logging.DEBUG
        if self.dry_run:
            level = logging.INFO
        for torrent in torrents:
            self.LOG.log(level, 'held back: %s: %s', torrent, why)
        self.held.setdefault(kind_of_error(why), (why, []))[1].extend(torrents)
        self.remember(torrents, why)

    def tell_of_held(self):
        """Log what was held back in this run: for each kind of reason once, then now and then."""
        for kind, (why, torrents) in self.held.items():
            more = ''
            if torrents[1:]:
                more = f' and {len(torrents) - 1} more'
            if not self.dry_run and self.repeats.deserve_line(kind):
                self.LOG.info('held back: %s%s: %s', torrents[0], more, why)

    def put_off(self, removal, why: HeldBack):
        """Log that what was cut short cannot be taken up yet: once, then now and then."""
        if self.repeats.deserve_line(removal.path):
            self.LOG.info('held back: %s: %s', removal, why)

    def remember(self, torrents, why):
        """Keep for the page which torrents are left alone."""
        for torrent in torrents:
            shown = ''
            if len(self.left_alone) < self.SHOWN:
                shown = f'{quoted(torrent.name)}: {why}'
            self.left_alone.append(shown)

    def announce(self, *words):
        to_do = super().announce(*words)
        if not to_do:
            torrents = [word for word in words if isinstance(word, Torrent)]
            self.remember(torrents, f'{words[0]}, if it were no dry run')
        return to_do

    def outlook(self):
        lines = self.left_alone[:self.SHOWN]
        more = self.left_alone[self.SHOWN:]
        if more:
            lines.append(f'and {len(more)} more')
        return lines

    def failed(self, torrent, error):
        """Log why a torrent failed: once, then from time to time."""
        self.failures.append(error)
        if self.repeats.deserve_line((torrent.hash, str(error))):
            self.LOG.warning('%s: %s', torrent, error)

    def each(self, torrents, handle, most: int | None = None):
        """Handle the torrents, until so many were changed; one that fails costs its turn only.

        handle: tells whether it changed the torrent. After a while they are looked at again: the
        user may have changed them meanwhile.
        """
        done, listed = 0, elapsed_time()
        self.failures, self.held = [], {}
        current = {torrent.hash: torrent for torrent in torrents}
        for at, torrent in enumerate(torrents):
            if done == most:
                self.hold_back(torrents[at:], HeldBack(f'the limit is {most}'))
                break
            if elapsed_time() - listed > self.FRESH:
                current = {now.hash: now for now in self.chosen()}
                listed = elapsed_time()
            if torrent.hash not in current:
                self.LOG.info('%s does not meet the condition any more', torrent)
                continue
            try:
                if handle(current[torrent.hash]):
                    done += 1
            except HeldBack as error:
                self.hold_back([torrent], error)
            except Unreachable:
                raise
            except (LoggableError, OSError, ValueError) as error:       # of a path with a NUL, say
                self.failed(torrent, error)
        self.tell_of_held()
        if not torrents and not self.left_alone:
            self.report('no torrent meets the condition')
        elif not done and not self.left_alone and not self.failures:
            self.report('nothing to do for %s', counted(len(torrents), 'torrent'))
        if self.failures:
            raise LoggableError(f"{counted(len(self.failures), 'torrent')} failed, the last: "
                                f'{self.failures[-1]}')


class QueueManager(Choice):
    """Start waiting torrents, a few per run, while there is room."""
    options = (
        Option('queue_startable_base', parse_condition, 'is_open=no is_active=no is_complete=no',
               'condition that any startable item must meet, too'),
        Option('startable', parse_condition, 'is_ignored=no done=0 message=/^$|ghost/ prio>0',
               'condition of what may be started (and queue_startable_base)', 'matcher'),
        Option('downloading', parse_condition, '', 'which active items count as downloading'),
        Option('sort_fields', parse_sort, '-prio, loaded, name', 'order of starting', 'sort'),
        Option('downloading_min', parse_count, '1', 'below this, start_at_once does not hold'),
        Option('downloading_max', parse_count, '9', 'most downloading items'),
        Option('start_at_once', parse_count, '1', 'most starts in one run'),
        Option('intermission', parse_duration, '0', 'least time between starts'),
        Option('downloading_traffic_max', parse_size, '0', 'start nothing above this rate; 0: any',
               'max_downloading_traffic'),
        Option('room', parse_size, '0', 'what has to stay free on the disk of an item; 0: any'),
        Option('viewname', str, '', 'view that is looked at; left out, pyrotorque or main'),
        Option('quiet', parse_bool, 'no', 'do not tell rTorrent either'),
        Option('log_to_client', parse_bool, 'yes', 'tell in the log of rTorrent, too'))
    RUNNING = 'is_complete=no [ is_open=yes OR is_active=yes OR is_hashing=yes OR d_state=1 ]'
    RUNNING_FIELDS = ('is_active', 'is_open', 'is_hashing', 'd_hashing_failed', 'message', 'down')
    turns: dict = {}                    # a lock for each rTorrent: its queues take turns

    def __init__(self, config):
        texts = ['*']
        for condition in (config.queue_startable_base, config.startable):
            if condition:
                texts.append(f'[ {condition.text} ]')
        config.update(matcher=Filter(' '.join(texts)), sort=config.sort_fields)
        super().__init__(config)
        where = self.engine.address.where
        self.turn = self.turns.setdefault(where, threading.Lock())
        if config.room:
            self.fields = ('left', 'path', 'free')
        self.running = Filter(self.RUNNING)
        self.counted = Filter('*')              # which of the running items take a place
        if config.downloading:
            self.counted = Filter(f'is_active=no OR [ {config.downloading.text} ]')
        self.not_started = set()                # hashes of what did not start the last time
        self.no_room_for = ''                   # hash of what the log says waits for room
        self.file = config.state_file('last_start')
        self.last_start = 0.0
        with contextlib.suppress(OSError, ValueError), open(self.file, encoding='ascii') as stream:
            self.last_start = float(stream.read())

    def run(self):
        """Start what there is a place for, in order, unless the intermission goes on."""
        now = time.time()
        # The clock may have been set back.
        self.last_start = min(self.last_start, now)
        rest = self.last_start + self.config.intermission - now
        if rest > 0:
            self.report('no start: the intermission goes on for %s', show_duration(rest))
            return
        with self.turn:
            self.left_alone = []
            startable = self.chosen()
            if not startable:
                self.report('no start: nothing is startable')
                return
            # All that is started and not complete: hashing, paused or failing, too. It is listed
            # after what may be started, so that nothing that has begun meanwhile is missed.
            fields = [*self.RUNNING_FIELDS, *self.fields, *self.counted.fields]
            running = list_torrents(self.engine, 'default', fields, self.running)
            hashes = {torrent.hash for torrent in running}
            waiting = [torrent for torrent in startable if torrent.hash not in hashes]
            if self.config.room:
                waiting = self.fitting(waiting, running)
            places = self.places(running)
            if waiting:
                self.each(waiting, self.start, places)

    def chosen(self):
        """Return what may be started, in order; what did not start the last time comes last."""
        config = self.config
        config['view'] = config.viewname
        if not config.viewname and self.engine.has_view('pyrotorque'):
            config['view'] = 'pyrotorque'
        torrents = super().chosen()
        return sorted(torrents, key=lambda torrent: torrent.hash in self.not_started)

    def hold_back(self, torrents, why):
        """Say nothing of all that wait for their turn."""
        self.remember(torrents, 'waits for its turn')

    def places(self, running):
        """Return how many may be started in this run, beside what is running."""
        config = self.config
        downloading = [*filter(self.counted.match, running)]
        count = len(downloading)
        traffic = sum(torrent.down for torrent in downloading)
        if 0 < config.downloading_traffic_max < traffic:
            self.report('no start: %s/s are downloaded', show_size(traffic))
            return 0
        most = config.downloading_max
        if count >= most:
            self.report('no start: %d of at most %d are downloading', count, most)
            self.tell_of_closed(downloading)
            return 0
        wanted = max(config.start_at_once, config.downloading_min - count)
        return min(wanted, most - count)

    def tell_of_closed(self, torrents):
        """Say of items that they take a place although rTorrent could not open them."""
        for torrent in torrents:
            # What waits for its turn to be checked is closed, too.
            waits = torrent.is_hashing and not torrent.d_hashing_failed
            if not torrent.is_open and not waits:
                why = quoted(torrent.message or 'rTorrent does not say why')
                self.failed(torrent, LoggableError(
                    f'could not be opened, and takes a place of the queue: {why}'))

    def fitting(self, torrents, running):
        """Return the items that their disk has room for, beside what is still coming to it."""
        coming: dict = collections.Counter()
        for torrent in running:
            device, _ = disk_of(torrent.path)
            coming[device] += torrent.left
        fitting, waiting = [], []
        for torrent in torrents:
            device, _ = disk_of(torrent.path)
            rest = (torrent.free or 0) - coming[device] - torrent.left
            if rest < self.config.room:
                waiting.append(torrent)
                continue
            coming[device] += torrent.left
            fitting.append(torrent)
        self.remember(waiting, 'no room')
        for torrent in waiting[:1]:
            self.tell_of_room(torrent)
        return fitting

    def tell_of_room(self, torrent):
        """Say that an item waits for room, once."""
        if torrent.hash == self.no_room_for:
            return
        self.no_room_for = torrent.hash
        free = 'it is not known what is free'
        if torrent.free is not None:
            free = f'{show_size(torrent.free)} are free'
        self.LOG.info('no room for %s, which needs %s: %s at %s', torrent,
                      show_size(torrent.left), free, quoted(torrent.path))

    def start(self, torrent) -> bool:
        """Start an item, and note when; raises RpcError when rTorrent does not."""
        if not self.announce('starting', torrent):
            return True
        config = self.config
        self.not_started.add(torrent.hash)
        self.act('d.start', torrent.hash)
        self.not_started.discard(torrent.hash)
        self.last_start = time.time()
        if config.intermission:
            replace_file(self.file, f'{self.last_start}\n')
        if config.log_to_client and not config.quiet:
            # Older ones take no emoji, for example.
            with contextlib.suppress(RpcError):
                text = f'torque: started {quoted(torrent.name)}'
                self.engine.tell([('print', '', text)])
        return True


# Action -> when there is something to do, and the commands for that, without the hash
PLAIN_ACTIONS: dict[str, tuple] = {
    'start': ('is_active=no', ('d.start',)),
    # also what is to be started when there is a place
    'stop': ('is_active=yes OR d_state=1', STOP),
    'close': ('is_open=yes OR d_state=1', STOP, CLOSE),
    'open': ('is_open=no', ('d.open',)),
    'hash_check': ('*', ('d.check_hash',)),
    # by rTorrent's own ratio groups and the like
    'ignore': ('is_ignored=no', ('d.ignore_commands.set', 1)),
    'heed': ('is_ignored=yes', ('d.ignore_commands.set', 0)),
    'delete': ('*', STOP, CLOSE, ERASE)}


def tag_commands(change, item, args) -> list[tuple]:
    """Add tags, or take them away."""
    tags = change({*item.tagged}, args.lower().replace(',', ' ').split())
    if tags == {*item.tagged}:
        return []
    return [('d.custom.set', 'tags', ' '.join(sorted(tags)))]


def custom_commands(item, args) -> list[tuple]:
    """Set a custom value, KEY=VALUE."""
    key, _, value = args.partition('=')
    if re.fullmatch('[1-5]', key):
        return [(f'd.custom{key}.set', value)]
    return [('d.custom.set', key, value)]


def prio_commands(item, args) -> list[tuple]:
    """Set the priority."""
    if item.prio == int(args):
        return []
    return [('d.priority.set', int(args)), ('d.update_priorities',)]


def throttle_commands(item, args) -> list[tuple]:
    """Put it into a throttle group, which rTorrent allows only while it is stopped."""
    change = ('d.throttle_name.set', args)
    if item.throttle == args:
        return []
    if item.is_active:
        return [STOP, change, ('d.start',)]
    return [change]


# Action -> fields that it needs, and what gives the commands for an item and args
OTHER_ACTIONS: dict[str, tuple[str, Any]] = {
    'cull': ('is_open path d_completed_bytes size ratio seedtime', None),
    'tag': ('tagged', functools.partial(tag_commands, set.union)),
    'untag': ('tagged', functools.partial(tag_commands, set.difference)),
    'custom': ('', custom_commands),
    'prio': ('prio', prio_commands),
    'throttle': ('throttle is_active', throttle_commands),
    'exec': ('', None),
    'log': ('', None)}
ACTIONS = (*PLAIN_ACTIONS, *OTHER_ACTIONS)
# What is not done to an item that is being checked
HALTING = ('stop', 'close', 'delete', 'cull', 'throttle')
WITH_ARGS = ACTIONS[ACTIONS.index('tag'):]      # log may have some
BAD_ARGS = (                            # action, what args must not have, and why
    ('prio', re.compile(r'\A(?![0-3]\Z)'), ' is no priority; allowed are 0 1 2 3'),
    ('custom', re.compile(r'\A(?![\w.-]+=)'), ' is not KEY=VALUE'),
    ('custom', re.compile(r'\A(label|custom_?[1-5])='),
     ': the label is called 1, the others 2 to 5; write 1=VALUE'),
    ('tag untag', re.compile(r'(^|[\s,])[+-]'),
     ': tags have no sign; the actions are tag and untag'))
CLOSED = '; it is closed: which files are its own is known once it has been opened for that'


def worth(torrent):
    """Return what a person needs to judge whether an item may go."""
    seeded = '?'
    if torrent.seedtime is not None:
        seeded = show_duration(torrent.seedtime)
    return f'({show_size(torrent.size)}, ratio {torrent.ratio:.2f}, seeded {seeded})'


def check_args(action, args):
    """Raise UserError for args that an action does not take."""
    if not args and action in WITH_ARGS[:-1]:
        raise UserError(f'is not set; the action {action} needs it')
    if args and action not in WITH_ARGS:
        raise UserError(f'the action {action} takes none')
    for actions, wrong, why in BAD_ARGS:
        if action in actions.split() and wrong.search(TAG.sub('{', args)):
            raise UserError(f'{args!r}{why}')


class Action(Choice):
    """Do something with every torrent that meets a condition; deleting has guards."""
    options = (
        *Choice.options,
        Option('action', functools.partial(parse_word, ACTIONS), '', ' '.join(ACTIONS)),
        Option('args', str, '', 'template for tag untag throttle log, KEY=VALUE for custom, 0 to '
                                '3 for prio, commands of rTorrent for exec'),
        Option('limit', parse_count, '', 'most torrents in a run; left out, all, or 10 to delete'),
        Option('confirm', parse_count, '1', 'act on what met the condition so many runs in a row'),
        Option('until_free', parse_size, '0', 'cull one by one until this much is free; 0: all'),
        Option('shared', functools.partial(parse_word, ('keep', 'delete')), 'keep',
               'data that another item has, too: keep or delete'))

    def __init__(self, config):
        super().__init__(config)
        action, args = config.action, config.args
        if action == 'custom':
            args = '='.join(part.strip() for part in args.split('=', 1))
        if config.until_free and action != 'cull':
            raise UserError('is for the action cull: nothing else frees anything',
                            option='until_free')
        with naming('args'):
            check_args(action, args)
        if (action, args) == ('throttle', 'none'):
            args = ''
        self.deletes = action in ('delete', 'cull')
        self.removes = action == 'cull'
        if action in PLAIN_ACTIONS:
            self.needed = Filter(PLAIN_ACTIONS[action][0])
            self.fields = self.needed.fields
        else:
            self.fields = tuple(OTHER_ACTIONS[action][0].split())
        self.halts = action in HALTING
        if self.halts:
            self.fields += ('is_hashing', 'd_hashing_failed')
        make = Template
        if action == 'exec':
            make = CommandTemplate
        self.template = self.use('args', make, args)
        self.met = {}                   # hash -> runs in a row that it met the condition
        self.gone = []                  # hashes that this dry run would have erased
        self.promised: Any = None       # PromisedSpace of this run

    def risks(self):
        """Return the conditions of a deleting rule that may mean more than meets the eye."""
        if not self.deletes:
            return []
        name = f'job.{self.config.job_name}.matcher'
        return [f'{name}: {text}: [...] stands for one of the characters in it, as in a shell'
                for text in self.config.matcher.classes]

    def run(self):
        """Act on what has met the condition often enough, as far as the guards allow."""
        # A run that fails before it has counted anew ends all runs in a row.
        met, self.met = self.met, {}
        with self.data_lock():
            if self.removes and not self.dry_run:
                self.finish_removals()
            self.gone, self.left_alone = [], []
            self.promised = PromisedSpace(os.path.join(self.config.state_dir, 'promised.json'))
            limit = self.config.limit
            if self.deletes and limit is None:
                limit = 10
            try:
                self.each(self.counted_runs(met), self.perform, limit)
            finally:
                if self.config.until_free and not self.dry_run:
                    self.promised.save()

    def counted_runs(self, met):
        """Return what meets the condition, and note in how many runs in a row it did."""
        torrents = self.chosen()
        for torrent in torrents:
            self.met[torrent.hash] = met.get(torrent.hash, 0) + 1
        return torrents

    def require_ready(self, torrent):
        """Raise HeldBack for what has not met the condition often enough, or cannot go now."""
        confirm = self.config.confirm
        # A dry run by hand shows what is done once enough runs agree.
        if self.dry_run and self.config.alone:
            confirm = 1
        if self.met[torrent.hash] < confirm:
            raise HeldBack(f'it has not yet met the condition in {confirm} runs in a row')
        if self.halts and torrent.is_hashing and not torrent.d_hashing_failed:
            raise HeldBack('it is being checked')

    def commands(self, torrent, args) -> list[tuple]:
        """Return the commands, without the hash, that the action comes to; none: nothing to do."""
        action = self.config.action
        if action == 'log':
            return []
        if action == 'exec':
            return [('branch', 'd.hash=', text) for text in self.template.commands(torrent)]
        if action in OTHER_ACTIONS:
            return OTHER_ACTIONS[action][1](torrent, args)
        if not self.needed.match(torrent):
            return []
        return [*PLAIN_ACTIONS[action][1:]]

    def perform(self, torrent):
        """Do the action on one torrent; tell whether there was anything to do."""
        action = self.config.action
        self.require_ready(torrent)
        if action == 'cull':
            return self.cull(torrent)
        shown = self.template.render(torrent)
        calls = [(method, torrent.hash, *rest)
                 for method, *rest in self.commands(torrent, shown)]
        if not calls and action != 'log':
            self.LOG.debug('%s %s: nothing to do', action, torrent)
            return False
        if self.announce(action, torrent, shown and quoted(shown)) and calls:
            answers = self.engine.tell(calls)
            if self.deletes:
                answers = answers[-1:]                  # erased is erased
            require_done(answers)
        return True

    # What follows is the action cull.

    def cull(self, torrent) -> bool:
        """Erase an item and delete its data, unless anything about that is doubtful."""
        require_same_files(self.engine)
        if self.is_enough(torrent.path):
            raise HeldBack(f'{show_size(self.config.until_free)} are free without it')
        if self.dry_run and not torrent.is_open:
            self.announce('cull', torrent, worth(torrent) + CLOSED)
            self.promised.update(torrent.path, torrent.d_completed_bytes)
            return True
        with opened(self.engine, torrent.hash) as (item, _):
            data = own_data(item)
            if not data.files:
                raise HeldBack(f'there is no data at {quoted(data.root)}; the action delete '
                               'is for an item without')
            data, why = self.without_users(item, data)
            for folder in {os.path.dirname(file.path) for file in data.files}:
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise LoggableError(f'nothing can be deleted in {quoted(folder)}')
            freed = freed_by(data)
            if self.config.until_free and not freed:
                raise HeldBack('deleting it frees nothing')
            shown = f"with {counted(len(data.files), 'file')} at {quoted(data.root)}"
            if self.announce('cull', torrent, worth(torrent), why or shown):
                self.erase_with_data(item, data, freed)
            else:
                self.gone.append(item.hash)
                self.promised.update(data.root, freed)
        return True

    def without_users(self, item, data) -> tuple[OwnData, str]:
        """Return the data that goes with an item, and why not all of it.

        Data that another item has in its own list, too, stays for that one. Where they only
        overlap the item is held back, for afterwards nobody would know of the rest.
        """
        if self.config.shared == 'delete':
            return data, ''
        users = Users(self.engines(), [item.hash, *self.gone])
        others = users.of(data)
        for owner, path in others.items():
            if users.has_all(owner, data):
                return data._replace(files=[], folders=[]), \
                    f'alone, its data stays: another item uses {quoted(path)}'
        for path in others.values():
            raise HeldBack(f'another item may use its data: {quoted(path)}')
        return data, ''

    def erase_with_data(self, item, data, freed):
        """Write down what is going to be removed, erase the item, and delete the data."""
        shared = self.config.shared == 'delete'
        removal = Removal.begin(self.config.state_dir, item, data, shared=shared)
        try:
            # From now on it does not change.
            item.tell(STOP, CLOSE)
            files = files_now(data)
            if files is None:
                raise HeldBack(f'{quoted(data.root)} was changed just now')
            data = data._replace(files=files)
            removal.mark(asked=True, files=files)
            erase(item)
        except Unreachable:             # the note stays, and the next run asks again
            raise
        except LoggableError:
            # Its user may have erased it just now: then nothing says that its data is to go.
            with contextlib.suppress(HashNotFound):
                start_again(item, item.state)
            removal.drop()
            raise
        self.promised.update(data.root, freed)
        try:
            removal.mark(erased=True)
            delete_data(data)
            removal.drop()
        # The item is gone, and counts.
        except (LoggableError, OSError) as error:
            self.failures.append(error)
            self.LOG.warning('%s; the next run tries again, by %s', error, removal.path)
        # What has appeared already is owed no more.
        self.promised.update(data.root)

    def finish_removals(self):
        """Finish what earlier runs could not; while that fails, nothing more is deleted."""
        for removal in left_removals(self.config.state_dir, self.engine):
            if 'new' in removal.facts:          # it is of a Move
                continue
            root = quoted(removal.data.root)
            why = why_keep(removal, self.engines())
            if why:
                # One that is there after it was erased is what the user has loaded since.
                if 'erased' not in removal.facts and removal.has_item():
                    try:
                        self.bring_back(removal)
                    except HeldBack as error:
                        self.put_off(removal, error)
                        continue
                self.LOG.warning('the data of %s at %s is kept: its removal was cut short, and %s',
                                 removal, root, why)
            else:
                require_same_files(self.engine)
                self.LOG.info('removing the rest of %s at %s', removal, root)
                try:
                    delete_data(removal.data)
                except LoggableError as error:
                    raise LoggableError(f'{error}; nothing more is culled until that works, or '
                                        f'{removal.path} is deleted') from None
            removal.drop()

    @staticmethod
    def bring_back(removal):
        """Have an item that was not erased as it was before."""
        item, root = removal.item(), removal.data.root
        # An rTorrent that died while it erased the item knows nothing of it but its metafile.
        if not item.completed_bytes and files_now(removal.data) and not is_at(item, root):
            tell_place(item, root)
        start_again(item, item.state)

    def is_enough(self, path):
        """Tell whether the disk of a path has what until_free asks for, with what is promised."""
        if not self.config.until_free:
            return False
        free = self.promised.update(path)
        # Where that is not known, what deleting would bring is not known either.
        return free is None or free >= self.config.until_free


OUTPUT_KEPT = 50000                     # bytes of what a program says


def keep_end(stream, kept):
    """Read all that a program says, and keep the end of it; a thread.

    It goes on while any process has the other end, so that none is ended by a closed pipe.
    """
    with stream:
        while True:
            content = stream.read1(1 << 16)
            if not content:
                return
            kept += content
            del kept[:-OUTPUT_KEPT]


class Command(Job):
    """Run a program."""
    options: Any = (
        Option('args', str, '', 'program and arguments; quotes as in a shell'),
        Option('shell', parse_bool, 'no', 'args is a line for the shell'),
        Option('cwd', str, '', 'folder to run in'),
        Option('env', parse_pairs, '', 'more environment: NAME=value, NAME=value'),
        Option('timeout', parse_duration, '', 'when the program and its children are ended'),
        Option('check', parse_bool, 'yes', 'no: a status other than 0 is no failure'))

    def __init__(self, config):
        super().__init__(config)
        self.process: Any = None                # the program that runs, or was the last to run
        if not config.args:
            raise UserError('is not set', option='args')
        self.words = ['/bin/sh', '-c', config.args]
        if not config.shell:
            with naming('args'):
                self.words = self.split(config.args)

    def split(self, args):
        """Return the words of args, the program first."""
        return split_args(args)

    def risks(self):
        """Return what is in args as if a shell read it."""
        risks = []
        for word in RAW_WORD.findall(self.config.args):
            found = LEFT_ALONE.match(word)
            if found and not self.config.shell:
                # Not the whole word: it may be a password.
                risks.append(f'job.{self.config.job_name}.args: {found[0][-1]} is passed on as it '
                             "is; write shell = yes where a shell is to read it, else '...'")
        return risks

    def check(self):
        import shutil
        # A path is that from the folder it is run in.
        path = program = self.words[0]
        if os.sep in program:
            path = os.path.join(os.path.expanduser(self.config.cwd), program)
        if shutil.which(path, path=self.config.env.get('PATH')):
            return []
        return [f'there is no program {quoted(program)}']

    def run(self):
        self.execute(self.words, {})

    def end_run(self):
        """End the program that still runs, and all it has started, gently first."""
        import subprocess
        if not self.process or self.process.returncode is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(3)

    def execute(self, words, environment):
        """Run the program once; its output goes to the log, a failure is raised."""
        import subprocess
        config = self.config
        line = quoted(shlex.join(words))
        if self.dry_run:
            self.announce('running', line)
            return
        # From here on without arguments: they may hold a password.
        self.LOG.debug('running %s', line)
        program = quoted(config.args.split()[0])
        try:
            self.process = subprocess.Popen(
                words,
                cwd=os.path.expanduser(config.cwd) or None,
                env={**os.environ, **environment, **config.env},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT)
        except (OSError, ValueError) as error:
            raise LoggableError(f'{program}: {error}') from None
        self.wait(program)
        status = self.process.returncode
        if status and config.check:
            raise LoggableError(f'{program} ended with status {status}')
        if status:
            self.LOG.info('%s ended with status %d', program, status)
        else:
            self.report('%s has ended', program)

    def wait(self, program):
        """Wait for the program, and log the end of its output; LoggableError if it is late."""
        import subprocess
        kept, timeout = bytearray(), self.config.timeout
        reader = in_thread(keep_end, self.process.stdout, kept)
        try:
            self.process.wait(timeout or None)
        except subprocess.TimeoutExpired:
            raise LoggableError(f'{program} ended with force after {timeout:g} s') from None
        finally:
            # This is done when torque is interrupted, too.
            self.end_run()
            # The end of the output, which a process that is left behind may hold open for ever.
            reader.join(1)
            for text in kept.decode('utf-8', 'replace').splitlines()[-100:]:
                self.LOG.info('%s', text[:500])


def once_mark(job_name):
    """Return the custom value that marks an item for a job, another one for each name."""
    plain = re.sub('[^A-Za-z0-9_-]', '_', job_name)
    if plain != job_name:
        number = binascii.crc32(job_name.encode('utf-8', 'surrogateescape'))
        plain += f'_{number:08x}'
    return f'torque_{plain}'


class ItemCommand(Choice, Command):
    """Run a program for every torrent that meets a condition."""
    options = (
        *Choice.options, *Command.options,
        Option('once', parse_bool, 'no', 'only once for each torrent, which is marked'))
    fields = ENVIRONMENT = (
        'hash', 'name', 'path', 'directory', 'label', 'size', 'ratio', 'alias', 'message')

    def __init__(self, config):
        super().__init__(config)
        if config.shell and '{{' in config.args:
            raise UserError('args of a shell are no template: names must not reach it; write '
                            '"$TORRENT_NAME" ...')
        self.mark = once_mark(config.job_name)
        if config.once:
            config['matcher'] = parse_condition(f'[ {config.matcher.text} ] custom_{self.mark}=')

    def split(self, args):
        """Return the program alone: what it is given depends on the torrent."""
        self.template = self.use('args', ArgsTemplate, args)
        return [self.template.program]

    def run(self):
        self.left_alone = []
        self.each(self.chosen(), self.for_torrent)

    def for_torrent(self, torrent) -> bool:
        """Run the program for one torrent, which counts as a change."""
        words = self.words
        if not self.config.shell:
            words = self.template.render(torrent)
        values = {f'TORRENT_{name.upper()}': show(torrent[name]).replace('\0', ' ')
                  for name in self.ENVIRONMENT}
        self.execute(words, values)
        if self.config.once:
            self.act('d.custom.set', torrent.hash, self.mark, '1')
            self.act('d.save_full_session', torrent.hash)
        return True


class Move(Choice):
    """Move the data of torrents that meet a condition, and tell rTorrent.

    The data becomes whole at the target first, as hard links or as copies, in a temporary
    folder; then rTorrent is told; then the source is removed. A Removal has noted all that:
    after a crash at any moment the torrent has whole data, and the next run goes on.
    """
    options = (
        *Choice.options,
        Option('target', str, '', 'folder to move to, a template; where it is empty, none'))
    fields = ('path', 'is_open')
    removes = True
    LONGEST_PAUSE = 3600                # seconds

    def __init__(self, config):
        super().__init__(config)
        if not config.target:
            raise UserError('is not set', option='target')
        if config.target[0] not in '/~{' or '..' in config.target.split('/'):
            raise UserError(f'{quoted(config.target)} is no absolute path; allowed are /... ~/... '
                            '{{...}}', option='target')
        self.template = self.use('target', Template, config.target)
        # 0.9.8 aborts over more than 10 tracker requests of an item in 10 s, and each try makes
        # some. hash -> failures, and until when it is left alone, in elapsed seconds
        self.pauses = {}

    def run(self):
        """Move what meets the condition, after what an ended run has left."""
        self.left_alone = []
        with self.data_lock():
            stuck = ''
            if not self.dry_run:
                stuck = self.take_up_all()
            self.each(self.chosen(), self.move)
            if stuck:
                raise LoggableError(f'a move that was cut short cannot be finished: {stuck}')

    def take_up_all(self):
        """Finish or undo what ended runs have left; return what keeps one from that, or nothing."""
        stuck = ''
        for removal in left_removals(self.config.state_dir, self.engine):
            info_hash = removal.facts['hash']
            if 'new' not in removal.facts or self.is_paused(info_hash):
                continue
            try:
                self.take_up(removal)
            except Unreachable:
                raise
            except HeldBack as error:
                self.put_off(removal, error)
            except (LoggableError, OSError) as error:       # others are moved all the same
                stuck = f'{removal}: {error}'
                self.LOG.warning('%s', stuck)
                if not self.is_paused(info_hash):
                    self.pause(info_hash)
        return stuck

    def is_paused(self, info_hash):
        """Tell whether an item is left alone after a failure."""
        _, until = self.pauses.get(info_hash, (0, 0.0))
        return elapsed_time() < until

    def pause(self, info_hash):
        """Leave an item alone, after every failure for longer."""
        failures, _ = self.pauses.get(info_hash, (0, 0))
        seconds = min(60 * 2 ** failures, self.LONGEST_PAUSE)
        self.pauses[info_hash] = failures + 1, elapsed_time() + seconds

    def move(self, torrent) -> bool:
        """Move one item, unless anything about that is doubtful."""
        folder = os.path.expanduser(self.template.render(torrent))
        if not folder or self.is_paused(torrent.hash):
            return False
        if not os.path.isabs(folder) or '..' in folder.split('/'):
            raise HeldBack(f'target {quoted(folder)} is no absolute path')
        folder = os.path.normpath(folder)
        place = identity(folder)
        if place and place == identity(os.path.dirname(torrent.path)):
            return False
        require_same_files(self.engine)
        if self.dry_run and not torrent.is_open:
            return self.announce('moving', torrent, 'to', quoted(folder) + CLOSED)
        with opened(self.engine, torrent.hash) as (item, fresh):
            data = own_data(item)
            root = quoted(data.root)
            if place and place == identity(os.path.dirname(data.root)):
                return False
            target = os.path.join(folder, os.path.basename(data.root))
            self.require_movable(item, data, target)
            if self.announce('moving', torrent, 'from', root, 'to', quoted(folder)):
                if fresh:
                    item = item._replace(is_open=0)     # as it shall be afterwards
                self.carry_out(item, data, target)
        return True

    @staticmethod
    def copy_place(item, target):
        """Return the temporary folder beside a target in which data becomes whole."""
        return os.path.join(os.path.dirname(target), f'.torque-{item.hash}')

    def require_movable(self, item, data, target):
        """Raise HeldBack where an item is better not moved."""
        if not data.files:
            raise HeldBack(f'there is no data at {quoted(data.root)}')
        pieces = item.pieces()
        for file in item.files:
            some = '1' in pieces[file.range_first:file.range_second]
            if some and not file.is_created:
                raise HeldBack(f'{quoted(file.frozen_path)} is not there')
        folder = os.path.dirname(target)
        above = folder
        while above != os.path.dirname(above):
            if identity(above) == identity(data.root):
                raise HeldBack(f'{quoted(folder)} lies in it')
            above = os.path.dirname(above)
        users = Users(self.engines(), [item.hash])
        for path in [*users.of(data).values(), users.places.get(place_of(target), '')]:
            if path:
                raise HeldBack(f'another item uses {quoted(path)}')
        for path in (target, self.copy_place(item, target)):
            if os.path.lexists(path):
                raise HeldBack(f'{quoted(path)} exists: nothing is overwritten')
        require_room(data, folder)

    def carry_out(self, item, data, target):
        """Have the data of an item at the target, and rTorrent use it there."""
        make_folders(os.path.dirname(target))
        copy = self.copy_place(item, target)
        removal = Removal.begin(self.config.state_dir, item, data, new=target, copy=copy)
        try:
            self.copy(item, removal)
        except HeldBack:                        # it was not even closed
            removal.drop()
            raise
        except BaseException:
            self.undo(item, removal)
            raise
        self.settle(item, removal)

    def copy(self, item, removal):
        """Close an item, and have its data at the target."""
        copy, target = removal.facts['copy'], removal.facts['new']
        item.tell(CLOSE)                # d.state stays as it is
        os.mkdir(copy, 0o700)
        made = os.path.join(copy, os.path.basename(target))
        copies = copy_data(removal.data, made)
        if ask_item(self.engine, item.hash).is_open:
            raise LoggableError('it was opened while its data was copied')
        removal.mark(copies=moved(copies, target).files)
        rename_new(made, target)

    def settle(self, item, removal):
        """Have rTorrent use the data at the target, and remove the source."""
        data, target = removal.data, removal.facts['new']
        try:
            tell_place(item, target)
            item.tell(('d.open',))
            now = ask_item(self.engine, item.hash)
            if not is_at(now, target):
                raise LoggableError(f'rTorrent took {quoted(target)} for something else')
            if sum(file.is_created for file in now.files) < len(data.files):
                raise LoggableError(f'rTorrent cannot open the data at {quoted(target)}: it stays '
                                    'at the old place')
            save_session(now)
        except BaseException:
            if files_now(data):
                self.undo(item, removal)
            raise
        self.finish(item, removal)

    def go_on(self, item):
        """Have an item that was closed go on as it did, or as its user wants by now."""
        # d.state does not change while it is closed, unless the user has started or stopped it.
        start_again(item, ask_item(self.engine, item.hash).state)

    @contextlib.contextmanager
    def ending(self, item, removal):
        """Let an item go on after what is done in here; the note goes if that went well."""
        try:
            yield
            discard(removal.facts['copy'])
        finally:
            self.go_on(item)
        removal.drop()

    def undo(self, item, removal):
        """Have an item use its old place again, and remove what was made at the new one.

        Where rTorrent is away all stays as it is, for the next run.
        """
        self.pause(item.hash)
        tell_place(item, removal.data.root)
        with self.ending(item, removal):
            if 'copies' in removal.facts:
                delete_data(removal.copies())

    def finish(self, item, removal):
        """Remove the files of an item at its old place, which are at the new one, too."""
        data, why = removal.data, ''
        self.pause(item.hash)
        with self.ending(item, removal):
            if not files_now(removal.copies()):
                why = f"{quoted(removal.facts['new'])} does not have all of it"
            for path in Users(self.engines(), [item.hash]).of(data).values():
                why = f'another item uses {quoted(path)}'
            if why:
                self.LOG.warning('%s stays, too: %s', quoted(data.root), why)
            else:
                delete_data(data)
        self.pauses.pop(item.hash)

    def take_up(self, removal):
        """Finish a move that an ended run has begun, or undo it where the copy is not whole."""
        data, copies, there = removal.data, removal.copies(), removal.has_item()
        root, target = quoted(data.root), quoted(copies.root)
        if not there:
            why = 'rTorrent does not have it any more'
            if there is None:
                why = 'that was another rTorrent'
            if os.path.lexists(copies.root):
                root += f' and {target}'
            self.LOG.warning('the data of %s stays at %s: its move was cut short, and %s',
                             removal, root, why)
            discard(removal.facts['copy'])
            removal.drop()
            return
        require_same_files(self.engine)
        item, source = removal.item(), files_now(data)
        is_whole = bool(files_now(copies))
        if is_whole and source and not is_at(item, copies.root):
            # It may have gone on at its old place: then copies are old, unless they are links.
            item.tell(CLOSE)
            removal.data = data._replace(files=source)
            try:
                is_whole = all(same_content(file.path, copy.path)
                               for file, copy in zip(source, copies.files))
            except OSError:
                self.go_on(item)
                raise
        if is_whole:
            self.LOG.info('finishing the move of %s to %s', removal, target)
            self.settle(item, removal)
        elif source:
            self.LOG.info('the move of %s was cut short; it is started again at its old place',
                          removal)
            self.undo(item, removal)
            self.pauses.pop(item.hash, None)
        else:
            raise LoggableError(f'neither {root} nor {target} has all of it; {removal.path} '
                                'tells more')


class Inotify:
    """Wakes who waits for changes in folders, as Linux tells of them.

    Raises OSError where that does not work. A folder that is moved elsewhere stays watched.
    """
    # ATTRIB (a file may be readable now), CLOSE_WRITE, MOVED_TO, CREATE, DELETE_SELF, MOVE_SELF;
    # the last one is ONLYDIR.
    MASK = 0x4 | 0x8 | 0x80 | 0x100 | 0x400 | 0x800 | 0x1000000

    def __init__(self):
        import ctypes
        self.get_errno = ctypes.get_errno
        self.libc = ctypes.CDLL(None, use_errno=True)
        handle = self.call('inotify_init1', os.O_NONBLOCK | os.O_CLOEXEC)
        self.events = open(handle, 'rb', 0)
        # A disk mounted over a folder is no event of the folder; this file tells of it.
        self.mounts = open('/proc/self/mountinfo', 'rb', 0)
        self.poll = select.poll()
        self.poll.register(self.events, select.POLLIN)
        self.poll.register(self.mounts, select.POLLPRI)

    def call(self, name, *args) -> int:
        """Return what a system call gives."""
        result = getattr(self.libc, name)(*args)
        if result < 0:
            number = self.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def add(self, folder):
        """Watch a folder; one that is watched already stays so."""
        path = os.fsencode(folder)
        self.call('inotify_add_watch', self.events.fileno(), path, self.MASK)

    def wait(self, seconds):
        """Wait so long at most; tell whether something changed, once for many changes."""
        changed = bool(self.poll.poll(seconds * 1000))
        self.events.read(1 << 16)
        return changed

    def close(self):
        """Watch nothing any more."""
        self.events.close()
        self.mounts.close()


class FileState(NamedTuple):
    """What tells a file from another, and from itself before it was changed."""
    device: int
    inode: int
    size: int
    changed: int                        # Unix nanoseconds, as nobody can set them
    modified: float                     # Unix seconds


def file_state(status):
    """Return the state of a file."""
    return FileState(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns,
                     status.st_mtime)


def parse_mode(text):
    """Return how new items are loaded: load is normal, started is start."""
    return parse_word(('normal', 'start', 'load', 'started'), text or 'normal')


class Handled(NamedTuple):
    """What became of a file."""
    state: Any = None                   # its FileState when it was handled
    item: str = ''                      # hash of its item
    error: str = ''                     # why it is to be tried again


class Refused(LoggableError):
    """rTorrent does not take a metafile, and will not take it later either."""


def others_may(mode, path):
    """Tell whether other users have one of these permissions on a file or folder."""
    with contextlib.suppress(OSError):
        return bool(os.stat(path).st_mode & mode)
    return False


class TreeWatch(Job):
    """Load metafiles that appear in trees of folders.

    A look through the trees decides what is new; an event of inotify only means `look again`.
    A thread waits for events, and looks after growing pauses when there are none.
    """
    options = (
        Option('path', str, '', 'folders to watch, separated by :'),
        Option('load_mode', parse_mode, 'normal', 'normal, or start'),
        Option('started', parse_bool, 'no', 'the same as load_mode = start'),
        Option('queued', parse_bool, 'no', 'leave starting to the queue: "start" keeps the '
                                           'priority, "normal" sets it to off'),
        Option('quiet', parse_bool, 'no', 'do not tell rTorrent'),
        Option('print_to_client', parse_bool, 'yes', 'tell in the log of rTorrent, too'),
        Option('inotify', parse_bool, 'yes', 'no: only look on schedule (network mounts)'),
        Option('remove_already_added', parse_bool, 'no', 'delete a metafile whose item was there '
                                                         'before, and is not tied to it'),
        Option('check_unhandled', parse_bool, 'yes', 'has no effect: files are never missed'),
        Option('preload_fields', str, '', 'has no effect: what is needed is known'),
        Option('trace_inotify', parse_bool, 'no', 'log when inotify tells of changes'),
        Option('cmd.NAME', str, '', 'command for the new item, a template; cmd_NAME too'))
    at_start = True
    families = ('cmd.', 'cmd_')
    # Trash and caches of file servers and file systems, in lower case; what begins with a dot is
    # not looked into either.
    SKIPPED = ('@eadir|@tmp|@recycle|@recently-snapshot|@sharebin|@synoresource|@upload_cache|'
               '@__thumb|#recycle|#snapshot|$recycle.bin|recycled|recycler|lost+found|'
               'system volume information').split('|')
    FLAGS = ('start', 'load', 'queue')
    METAFILE = re.compile(r'\.(?:load|start|queue|(?i:torrent))\Z')      # flags: lower case
    SESSION_LOCK = 'rtorrent.lock'      # lies in every session folder while it is in use
    TELL = CommandTemplate('print={{told}}', ('told',))
    RETRY = 5.0                         # seconds until what did not work is tried again
    MOST = 3600.0                       # seconds, to which that grows
    REST = 9                            # times as long as it looked it does not look again
    NAMES = tuple('pathname relpath rel_path watch_path info_hash info_name tracker_alias '
                  'filetype label traits flags'.split())

    def __init__(self, config):
        super().__init__(config)
        paths = [os.path.expanduser(path.strip()) for path in config.path.split(os.pathsep)]
        self.roots = [os.path.abspath(path) for path in paths if path]
        if not self.roots:
            raise UserError('is not set', option='path')
        self.commands = []
        for key in sorted(config):
            if key.startswith(self.families):
                with naming(key):
                    self.commands.append(CommandTemplate(str(config[key]), self.NAMES))
        self.lock = threading.Lock()            # run() and the watching thread take turns
        self.repeats = Repeats()
        self.handled: dict[str, Handled] = {}
        self.lost: collections.Counter = collections.Counter()  # FileState -> lost rTorrents
        self.file = config.state_file('loaded')
        with contextlib.suppress(OSError, ValueError, TypeError):
            with open(self.file, encoding='ascii') as stream:
                for path, (state, item, _) in json.load(stream).items():
                    self.handled[path] = Handled(FileState(*state), item, 'of another run')
        self.kept = self.handled.copy()         # what the file in the state folder says
        self.trouble = {}                       # what the last look could not read, and why
        self.took = 0.0                         # seconds, to look through the trees
        self.by_path = self.engine.address.is_local()
        self.inotify: Inotify | None = None
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()

    def risks(self):
        """Return what lets others load items: folders that every user may write."""
        return [f'{root}, which is watched, can be written by every user'
                for root in self.roots if others_may(0o002, root)]

    def run(self):
        """Look through the trees, and see to it that changes are watched from now on."""
        with self.lock:
            try:
                self.start_watching()
            finally:
                known = self.handled.copy()
                # A thread that watches goes on to look, and tells when all is well again.
                if self.thread:
                    self.look_again()
                else:
                    self.look()
            if self.handled == known:
                self.report('no new metafile below %s', ' '.join(self.roots))

    def check(self):
        for root in self.roots:
            try:
                os.listdir(root)
            except OSError as error:
                self.failed(root, error)
        called = [template.called for template in self.commands]
        return [*self.trouble.values(), *self.unknown_commands(itertools.chain(*called))]

    def cleanup(self):
        """Load nothing any more; a file in progress has a while to end."""
        self.ended.set()
        if self.lock.acquire(timeout=5):
            self.lock.release()

    # Watching.

    def start_watching(self):
        """Have a thread look at once when something changes."""
        is_watching = self.thread and self.thread.is_alive()
        if is_watching or self.config.alone or not self.config.inotify:
            return
        self.inotify = None
        try:
            self.inotify = Inotify()
            self.thread = in_thread(self.watch, self.inotify)
        except Exception as error:
            raise LoggableError(f'no inotify, files are found on schedule only: {error}; where '
                                'that is how it should be, write inotify = no') from None

    def watch(self, inotify):
        """Look again whenever something changed, and after pauses; a thread, until cleanup()."""
        pause = self.RETRY
        with contextlib.closing(inotify):
            while not self.ended.wait(self.REST * self.took):
                changed = inotify.wait(pause)
                if self.ended.is_set():
                    return
                if changed and self.config.trace_inotify:
                    self.LOG.info('inotify: something changed')
                with self.lock:
                    well = self.look_again()
                pause = min(2 * pause, self.MOST)
                # No event tells that a root, or rTorrent, is there again.
                if changed or not well:
                    pause = self.RETRY

    def look_again(self):
        """Look, say in the log what went wrong, and tell whether all was well."""
        try:
            self.look()
        except LoggableError as error:
            if not error.told and self.repeats.deserve_line(str(error)):
                self.LOG.warning('%s', error)
            return False
        return not self.trouble

    # Looking.

    def look(self):
        """Handle what is new in the trees; LoggableError where one cannot be read.

        Where a thread watches, it is said in the log instead.
        """
        # By a clock that stands while the machine sleeps
        began, before = time.monotonic(), self.trouble
        files = self.scan()
        self.took = time.monotonic() - began
        if self.thread:
            self.tell_of_trouble(before)
        try:
            for path in sorted(files):
                last = self.handled.get(path, Handled())
                is_new = last.error or last.state != files[path]
                if is_new and not self.ended.is_set():
                    self.handled[path] = self.handle(path, files[path], last)
            # Only now: one that has another name by now is known.
            for path in self.handled.keys() - files.keys():
                if self.is_gone(path):
                    del self.handled[path]
        finally:
            self.keep_loaded()
        if self.trouble and not self.thread:
            raise LoggableError('; '.join(self.trouble.values()))

    def is_gone(self, path):
        """Tell whether a file that was handled is not there any more, for sure."""
        # Its folder may not be there, or not be readable, or its disk may not be mounted now.
        with contextlib.suppress(OSError):
            is_seen = not self.trouble or os.path.isdir(os.path.dirname(path))
            is_mounted = disk_of(path)[0] == self.handled[path].state.device
            return is_seen and is_mounted and identity(path) is None
        return False

    def tell_of_trouble(self, before):
        """Say what cannot be watched or read, where that has changed."""
        if before and not self.trouble:
            self.LOG.info('all folders are watched again')
        elif self.trouble != before:
            self.LOG.warning('%s', '; '.join(self.trouble.values()))

    def scan(self) -> dict[str, FileState]:
        """Return the metafiles below the roots; have their folders watched."""
        session = self.session_folder()
        files = {}
        self.trouble = {}
        visited = {session}
        left = collections.deque(self.roots)
        while left:
            path = left.popleft()
            try:
                status = os.stat(path)
                known = status.st_dev, status.st_ino
                if not stat.S_ISDIR(status.st_mode):
                    if self.METAFILE.search(path):
                        files[path] = file_state(status)
                elif known == session and path in self.roots:
                    raise OSError(errno.EPERM, 'it is the session folder of rTorrent')
                elif known not in visited:
                    visited.add(known)
                    self.scan_folder(path, left)
            except OSError as error:
                self.failed(path, error)
        return files

    def scan_folder(self, folder, left):
        """Add the paths in a folder to those that are left; have changes in it told."""
        # Watched before it is read: what comes in between is in both.
        if self.inotify:
            try:
                self.inotify.add(folder)
            except OSError as error:
                self.failed(folder, error)
        if os.path.lexists(os.path.join(folder, self.SESSION_LOCK)):
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                is_skipped = entry.name.startswith('.') or entry.name.lower() in self.SKIPPED
                # Links last, so that a folder goes by its own name where it has one in the trees.
                if entry.is_symlink() and not is_skipped:
                    left.append(entry.path)
                elif not is_skipped or entry.is_file(follow_symlinks=False):
                    left.appendleft(entry.path)

    def failed(self, path, error):
        """Note what cannot be watched or read; one for each reason is enough."""
        why = str(error.strerror)
        if error.errno == errno.ENOSPC:
            why = 'too many inotify watches'
        text = f'{quoted(path)} cannot be watched or read: {why}'
        is_gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
        if path in self.roots:
            if is_gone:
                text = f'{quoted(path)} is not there; it is watched when it comes'
            self.trouble[path] = text
        elif not is_gone:
            self.trouble.setdefault(why, text)

    def session_folder(self):
        """Return the identity of rTorrent's session folder; None where it has none.

        What lies there is rTorrent's own: it is not loaded, and never removed.
        """
        engine = self.engine
        # After that it has told its folders.
        engine.reach()
        if engine.session_path:
            # One that may not be looked at cannot be reached from a watched folder either.
            with contextlib.suppress(OSError):
                return identity(os.path.join(engine.cwd, engine.session_path))
        return None

    def keep_loaded(self):
        """Keep for the next start which files were loaded.

        rTorrent deletes a file with its item only if it is tied to it, and the folder may be
        written. An item that was erased must not come back from one that stays.
        """
        loaded = {path: done for path, done in self.handled.items() if done.item}
        if loaded != self.kept and not self.dry_run:
            replace_file(self.file, json.dumps(loaded))
            self.kept = loaded

    # Loading.

    def handle(self, path, state, before) -> Handled:
        """Load a new metafile; say why it was not loaded, once, and whether it may be later."""
        name = quoted(path)
        try:
            return Handled(state, self.load(path, state, read_metafile(path)))
        except Unreachable:
            raise
        except FileNotFoundError:
            pass
        except ValueError as error:
            # Somebody may be writing it just now; the clock of a file server may be ahead.
            age = time.time() - state.modified
            if abs(age) < 2 * self.RETRY and not self.config.alone:
                return Handled(state, error=str(error))
            self.LOG.warning('%s is not loaded: %s', name, error)
        except Refused as error:
            self.LOG.warning('%s is not loaded: %s', name, error)
        except Exception as error:
            failed = Handled(state, error=repr(error))
            if failed != before:
                is_fault = not isinstance(error, (OSError, LoggableError))
                self.LOG.warning('%s is not loaded: %s', name, error, exc_info=is_fault)
            return failed
        return Handled(state)

    def values(self, path, meta) -> dict[str, Any]:
        """Return what templates know of a file."""
        roots = [root for root in self.roots if path.startswith(os.path.join(root, ''))]
        root = max(roots, key=len, default=os.path.dirname(path))
        *folders, base = path[len(root):].strip(os.sep).split(os.sep)
        # Flags are no part of a label.
        relative = os.sep.join([folder for folder in folders if folder not in self.FLAGS])
        ending = os.path.splitext(meta.main_file)[1]
        kind = ending[1:]
        traits = name_traits(meta.name, kind.lower())
        label = traits['kind']
        if label and kind:
            label += f'/{kind}'
        return {
            'pathname': path,
            'watch_path': root,
            'rel_path': relative or '.',
            'relpath': relative,
            'info_hash': meta.info_hash,
            'info_name': meta.name,
            'filetype': ending,
            'tracker_alias': tracker_alias(meta.tracker, self.engine.aliases),
            'flags': sorted({os.path.basename(root), *folders, *base.split('.')}),
            'traits': traits,
            'label': label}

    def plan(self, path, meta) -> tuple[str, list[str], dict[str, Any]]:
        """Return how a file is loaded, the commands for its item, and what templates know of it.

        Flags in its path count more than options.
        """
        values, config = self.values(path, meta), self.config
        flags = values['flags']
        commands = []
        for template in self.commands:
            commands += template.commands(values)
        start = 'start' in flags
        if not start and 'load' not in flags:
            start = config.started or config.load_mode.startswith('start')
        how = 'loaded'
        if config.queued or 'queue' in flags:
            how = 'queued'
            if not start:
                commands.append('d.priority.set=0')
        elif start:
            how = 'started'
        return how, commands, values

    def ask(self, *call):
        """Return the answer to one question, an RpcError where it failed."""
        return self.engine.ask([call])[0]

    def was_loaded(self, state, meta):
        """Tell whether the item of a file came from it, whatever names and modes it has had."""
        # Some disks number their files anew
        facts = (state.inode, state.size, state.modified)
        return any(done.item == meta.info_hash and (
            done.state.changed == state.changed
            or facts == (done.state.inode, done.state.size, done.state.modified))
            for done in self.handled.values())

    def load(self, path, state, meta):
        """Load a metafile unless its item is there, or was; return the hash of the item."""
        tied = self.ask('d.tied_to_file', meta.info_hash)
        if not isinstance(tied, HashNotFound):
            without_errors([tied])
            tied = tied and os.path.join(self.engine.cwd, os.path.expanduser(tied))
            # One that rTorrent shows with other characters is not there, and nothing is removed.
            with contextlib.suppress(OSError):
                if identity(tied) == identity(path):
                    return meta.info_hash
            # One that is tied to nothing may have come from this file.
            if tied or not self.was_loaded(state, meta):
                self.LOG.info('%s: %s is loaded already', quoted(path), quoted(meta.name))
                if self.config.remove_already_added:
                    self.remove(path, state, tied)
        elif self.was_loaded(state, meta):
            self.LOG.info('%s was loaded before, and its item was erased; touch it to have it '
                          'loaded again', quoted(path))
        else:
            self.load_new(path, state, meta)
        return meta.info_hash

    def remove(self, path, state, tied):
        """Remove a file that was read, unless it may be the last metafile of the item."""
        if tied and (DOUBTFUL.search(tied) or not os.path.exists(tied)):
            return
        # A link, and a file that was changed since it was read, have another state.
        if file_state(os.lstat(path)) != state:
            return
        if self.announce('removing', quoted(path)):
            os.remove(path)

    def load_new(self, path, state, meta):
        """Load a metafile and wait for its item."""
        how, commands, _ = self.plan(path, meta)
        shown = f'{quoted(meta.name)} from {quoted(path)}'
        if how != 'loaded':
            shown += f' [{how}]'
        if self.dry_run:
            self.announce('loading', shown)
            return
        first = []
        if 'tm_loaded' not in str(commands):
            first = [f'd.custom.set=tm_loaded,{time.time():.0f}']
        if self.config.print_to_client and not self.config.quiet:
            first += self.TELL.commands({'told': f'torque: loaded {shown}'})
        if self.lost[state] == 2:
            raise Refused('rTorrent went away twice when it was sent; touch it to have it tried '
                          'again')
        try:
            self.send(path, meta, how == 'started', first + commands)
        except Unreachable:
            self.lost[state] += 1
            raise
        self.LOG.info('loaded %s', shown)
        if commands:
            message = str(self.ask('d.message', meta.info_hash))
            # Of a command that failed; the item is there all the same.
            if 'creation failed' in message:
                self.LOG.warning('%s: %s', quoted(meta.name), quoted(message))

    def send(self, path, meta, start: bool, commands):
        """Load by path where rTorrent sees the file, else by content."""
        by_path, by_content = 'load.normal', 'load.raw'
        if start:
            by_path, by_content = 'load.start', 'load.raw_start'
        # The path of load.normal is a pattern: rTorrent would look for other files.
        is_pattern = re.search(r'[*?[]', path)
        if self.by_path and not is_pattern:
            self.act(by_path, '', path, *commands)
            if self.appears(meta):
                return
        self.send_content(by_content, meta.content, commands)
        if not self.appears(meta):
            why = 'rTorrent did not take it, and does not say why'
            if not meta.tracker:
                why += '; it has no tracker: is DHT off?'
            raise Refused(why)
        if why_unseen(self.engine):
            self.by_path = False
        elif is_pattern:
            self.act('d.tied_to_file.set', meta.info_hash, path)
            self.act('d.save_full_session', meta.info_hash)

    def send_content(self, method, content, commands):
        """Load by content; what is too large for one request is no sign that rTorrent is away."""
        try:
            self.act(method, '', content, *commands)
        except Unreachable:
            if len(content) <= 100000:
                raise
            self.ask('system.pid', '')
            size = show_size(len(content))
            raise Refused(f'{size} are more than rTorrent takes in one request') from None

    def appears(self, meta):
        """Tell whether a new item comes up in time: load commands never say what went wrong."""
        end = elapsed_time() + 1 + len(meta.content) / 5e6
        pause = 0.0002
        while elapsed_time() < end:
            answer = self.ask('d.hash', meta.info_hash)
            if not isinstance(answer, HashNotFound):
                without_errors([answer])
                return True
            time.sleep(pause)
            # Who asks too often keeps rTorrent from loading it.
            pause = min(1.5 * pause, 0.05)
        return False

    def explain(self, path):
        """Return lines that tell what would be done with a metafile."""
        path = os.path.abspath(path)
        try:
            if not self.METAFILE.search(path):
                raise ValueError('its name ends in none of .torrent .load .start .queue')
            meta = read_metafile(path)
            how, commands, values = self.plan(path, meta)
        except (OSError, ValueError, LoggableError) as error:
            return [f"{path} is not loaded: {getattr(error, 'strerror', error)}"]
        first = f'{path}: {how}'
        if values['watch_path'] not in self.roots:
            first += ' (if it lay below path)'
        with contextlib.suppress(RpcError):
            without_errors([self.ask('d.hash', meta.info_hash)])
            first += '; but it is loaded already'
        lines = [first]
        for name, value in sorted(values.items()):
            lines.append(f'  {name} = {value!r}')
        for command in commands:
            lines.append(f'  command {command}')
        return lines


# --- Config ----------------------------------------------------------------------------------
# torque.ini becomes values (a text that knows where it stands), values become planned jobs, and
# those become the objects that run. Mistakes are collected, so that all are told at once, each as
# `file:line: setting: what is wrong; what is allowed`; only where there is none does anything
# start. What has no effect is a warning. config_ini is the configuration as jobs see it. All of
# this runs in the main thread.

# Where the configuration is looked for; without one the defaults are run.
INI_FILES = ['torque.ini', '$XDG_CONFIG_HOME/torque/torque.ini', '~/.config/torque/torque.ini',
             '~/.pyroscope/torque.ini']
NO_INI = '<defaults>'
INI_LIMIT = 1 << 20                     # bytes of a configuration file
SECTIONS = ('TORQUE', 'INFLUXDB', 'ANNOUNCE')
JOB_SETTING = re.compile(r'job\.([^.]+)\.(.+)')
FORM = 'job.NAME.PARAM, as in job.queue.active'
# Sections, and families of keys in [TORQUE], that are of other parts of pyrocore
OLD_SECTION = re.compile(r'GLOBAL|FORMATS|TRAITS_BY_ALIAS|(?:XMLRPC|SWEEP)\w*')
OLD_KEYS = re.compile(r'apscheduler\.|httpd\..*\.')
COMMON = ('scgi_url', 'rtorrent_rc')    # what is read of pyrocore's [GLOBAL]
DEFAULTS = """[TORQUE]
job.connstats.handler = torque:EngineStats
job.connstats.schedule = minute=*
job.connstats.active = yes
job.fluxstats.handler = torque:InfluxDB
job.fluxstats.schedule = second=*/15
job.fluxstats.active = no
job.queue.handler = torque:QueueManager
job.queue.schedule = second=*/15
job.queue.active = no
job.treewatch.handler = torque:TreeWatch
job.treewatch.schedule = hour=*
job.treewatch.active = no
"""
BUILT_IN = {f'torque:{job.__name__}': job for job in (
    EngineStats, InfluxDB, QueueManager, TreeWatch, Action, Command, ItemCommand, Move)}
# Jobs of pyrocore and pyrosimple that have another name here
OLD_NAMES = {
    'InfluxDBStats': 'InfluxDB',
    'PathMover': 'Move'}


def origin(error):
    """Return one line that says what was raised and in which line of which file."""
    if isinstance(error, SyntaxError):
        return f'{error.filename}:{error.lineno}: {error.msg}'
    place = ''
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not file.startswith('<') and file != origin.__code__.co_filename:
            place = f'{file}:{line}: '
    return f'{place}{type(error).__name__}: {error}'


def handler_name(text):
    """Return the `module:Class` of a handler, of ours for those of pyrocore and pyrosimple.

    >>> handler_name('pyrocore.torrent.jobs::InfluxDBStats'), handler_name('my.jobs:Space')
    ('torque:InfluxDB', 'my.jobs:Space')
    """
    text = text.replace('::', ':')
    old = re.fullmatch(r'(?:pyrocore|pyrosimple)\.(?:torrent|job)\.\w+:(\w+)', text)
    if old:
        text = 'torque:' + OLD_NAMES.get(old[1], old[1])
    return text


def import_handler(text):
    """Return the class that `module.path:ClassName` names."""
    handler = handler_name(text)
    if not re.fullmatch(r'[^\W\d][\w.]*:\w+', handler):
        raise UserError(f'{text!r} is no handler; allowed is module.path:ClassName')
    path, name = handler.split(':')
    try:
        __import__(path)
    # Whatever the module does when imported
    except (Exception, SystemExit) as error:
        raise UserError(f'module {path!r} cannot be imported: {origin(error)}') from None
    module = sys.modules[path]
    handler_class = getattr(module, name, None)
    if not callable(handler_class):
        classes = [word for word in dir(module) if isinstance(getattr(module, word), type)]
        raise UserError(f'module {path!r} has no class {name!r}{nearest(name, classes)}')
    return handler_class


def parse_due(text):
    """Return the Schedule of a job: one that is due again."""
    if not text:
        raise UserError('is missing; a job needs a handler and a schedule')
    schedule = parse_schedule(text)
    if schedule.next(time.time()) is None:
        raise UserError(f'{text!r} can never fire: there is no such date to come')
    return schedule


def parse_level(text):
    """Return a level of the log, or nothing."""
    return parse_word(('', 'DEBUG', 'INFO', 'WARNING', 'ERROR'), text.upper())


CORE_OPTIONS = (                        # what any job has
    Option('handler', import_handler, '', 'module:Class of the job'),
    Option('schedule', parse_due, '', 'when it runs'),
    Option('active', parse_bool, 'yes', 'no: the job is ignored'),
    Option('dry_run', parse_bool, 'no', 'only say what would be done'),
    Option('scgi_url', str, '', 'rTorrent of this job; left out, that of [TORQUE]'),
    Option('same_files', parse_bool, '', 'its paths mean files of this machine, though torque '
                                         'cannot prove it; left out, as in [TORQUE]'),
    Option('log_level', parse_level, '', 'DEBUG, INFO, WARNING or ERROR'),
    Option('max_runtime', parse_duration, '', 'a run is called overdue after this time'),
    Option('catch_up', parse_bool, 'no', 'make up at the start for a run missed before'),
    Option('ping_url', parse_ping_url, '', 'monitor that is told of runs: /start, /fail, '
                                         'or nothing added'))
TORQUE_OPTIONS = (                      # what [TORQUE] has beside jobs
    Option('scgi_url', str, '', 'where rTorrent answers; left out, rtorrent_rc tells'),
    Option('rtorrent_rc', str, '', "rTorrent's configuration"),
    Option('same_files', parse_bool, 'no', 'its paths mean files of this machine, though torque '
                                           'cannot prove it'),
    Option('rpc_timeout', parse_timeout, '30s', 'most time for one call to rTorrent'),
    Option('rpc_limit', parse_size, '64m', 'largest answer of rTorrent that is read'),
    Option('dry_run', parse_bool, 'no', 'all jobs only say what would be done'),
    Option('grace', parse_duration, '10s', 'time for runs in progress at the end'),
    Option('state_dir', str, '', 'folder for what must survive a restart'),
    Option('pid_file', str, '', 'left out, torque.pid in state_dir'),
    Option('log_file', str, '', 'log in the background; left out, torque.log in state_dir'),
    Option('ping_url', parse_ping_url, '', 'monitor of all jobs that do not name one'),
    Option('queue_startable_base', parse_condition, 'is_open=no is_active=no is_complete=no',
           'condition that any startable item of a queue must meet'),
    Option('httpd.active', parse_bool, 'no', 'serve a page for people, and figures'),
    Option('httpd.host', str, '127.0.0.1', 'address to serve at; others need httpd.password'),
    Option('httpd.port', parse_port, '8042', 'port to serve at'),
    Option('httpd.password', str, '', 'password of the page, with any user name'))


def option_names(options):
    """Return the names of options, and their other names."""
    names = [option.name for option in options]
    return names + [option.alias for option in options if option.alias]


CORE_NAMES = option_names(CORE_OPTIONS)
TORQUE_NAMES = option_names(TORQUE_OPTIONS)


class Value(str):
    """A text of the configuration; `place`: where it stands, `key`: the name it has there."""
    place: tuple[str, int]              # a file or `-D`, and the line, 0 for all of it
    key: str

    def __new__(cls, text, place=('', 0), key=''):
        value = super().__new__(cls, text)
        value.place = place
        value.key = key
        return value

    def located(self, text):
        """Return a line that says what is the matter with it, and where."""
        file, line = self.place
        if line and file != '-D':
            file = f'{file}:{line}'
        return one_line(': '.join(filter(None, (file, self.key, str(text)))))


class UnknownJob(UserError):
    """A job is named on the command line that the configuration does not have."""
    exit_status = EXIT_USAGE


class Mistakes(UserError):
    """All that is wrong with a configuration, a line each, in their order."""


class NumberedParser(configparser.RawConfigParser):
    """Puts before each key the number of its line, and leaves the delimiter behind it.

    optionxform() is called while the line of the key is in hand. Keys with numbers are all
    different, so none is lost when it is given twice.
    """
    SECTCRE = re.compile(r'\[(?P<header>[^][]+)\]')
    # Matches any line, so that none ends the reading. What follows ` ;` is a comment.
    OPTCRE = re.compile(
        r'(?s)(?P<option>(?:(?!\s;)[^=:])*[=:]?)(?P<value>.*?)(?P<vi>(?:\s;.*)?)\Z')

    def count(self, lines):
        """Give the lines."""
        for self.number, line in enumerate(lines):
            yield line

    def optionxform(self, optionstr):
        return f'{self.number} {optionstr}'


class Ini:
    """The values of configuration files by section and key; mistakes, and remarks for the log."""

    def __init__(self):
        self.sections: dict[str, dict[str, Value]] = {section: {} for section in SECTIONS}
        self.torque = self.sections['TORQUE']
        self.mistakes: list[tuple] = []                 # place, line
        self.remarks: list[tuple] = []                  # level of the log, line
        self.unused: set[str] = set()                   # what of pyrocore's has no use here

    def refuse(self, value, text):
        """Add a mistake, with what may have led to it."""
        if re.search(r'\s#', value):
            text = f'{text}; # begins a comment only at the start of a line'
        if re.fullmatch('"[^"]*"|\'[^\']*\'', value):
            text = f'{text}; values stand without quotes'
        self.mistakes.append((value.place, value.located(text)))

    def remark(self, text, level=logging.INFO):
        """Add a line for the log."""
        self.remarks.append((level, text))

    def warn(self, value, text):
        """Add a warning of what has no effect, or another one than it seems."""
        self.remark(value.located(text), logging.WARNING)

    def raise_mistakes(self):
        """Raise Mistakes if there are any."""
        if self.mistakes:
            raise Mistakes('\n'.join(line for _, line in sorted(set(self.mistakes))))

    def read(self, text, file, common=False):
        """Add the values of one file; common: it is pyrocore's config.ini."""
        # A header for what stands before the first one
        lines = ['[ ]', *text.split('\n')]
        parser = NumberedParser(strict=False, default_section='')
        parser.read_file(parser.count(lines), file)
        for header in parser.sections():
            for numbered, written in parser.items(header):
                number, _, key = numbered.partition(' ')
                written = re.sub('\n+', '\n', written)
                value = Value(written, (file, int(number)), key[:-1].rstrip())
                section = header.strip().upper()
                if common and section in ('GLOBAL', 'DEFAULT') and value.key in COMMON:
                    section = 'TORQUE'
                if common and section not in SECTIONS:
                    continue
                if re.fullmatch(r'[^[=:].*[=:]', key) and key.isprintable():
                    self.add(section, value, lines[int(number)])
                else:
                    self.refuse(Value('', value.place), 'neither KEY = VALUE nor [SECTION]')

    def add(self, section, value, line):
        """Add a value, which replaces an earlier one; tell what is not as it seems."""
        comment = re.search(r'\s;(.*)', line)
        if comment and ('=' in comment[1] or re.search(r'\.(args$|cmd[._])', value.key)):
            self.warn(value, 'what follows ` ;` is a comment, and cut off; a ; without a blank '
                             'before it belongs to the value')
        setting = re.search(rf"\n(jobs?\.[\w.-]+|{'|'.join(TORQUE_NAMES)}) *[=:]", value)
        if setting:
            self.warn(value, f'{setting[1]} below is indented, so it belongs to this value')
        if not section:
            self.refuse(value, 'stands before any [SECTION]; settings belong under [TORQUE]')
            return
        if re.search(r'%\(\w+\)s', value.replace('%%', '')):
            self.refuse(value, 'nothing is interpolated; write the value itself, and %% for %')
        values = self.sections.setdefault(section, {})
        before, number = values.get(value.key, Value('')).place
        if before == value.place[0]:
            self.warn(value, f'stands here again, and counts, not line {number}')
        text = value.replace('%%', '%')
        if text == '""':
            text = ''
        values[value.key] = Value(text, value.place, value.key)


def read_text(path):
    """Return the text of a configuration file; raises Mistakes where there is none."""
    try:
        status = os.stat(path)
        # A pipe would block, a device might never end.
        if stat.S_ISREG(status.st_mode) and status.st_size <= INI_LIMIT:
            with open(path, encoding='utf-8-sig') as stream:
                return stream.read()
        wrong = f'is no regular file of up to {show_size(INI_LIMIT)}'
    except (OSError, UnicodeDecodeError) as error:
        wrong = getattr(error, 'strerror', f'no text: {error}')
    raise Mistakes(Value('', (path, 0)).located(wrong))


def beside(path, name):
    """Return where a file named in a configuration is: a relative name is beside it."""
    if not name:
        return ''
    expanded = os.path.expanduser(name)
    if expanded.startswith('~'):
        raise UserError(f'{name!r}: there is no such home folder, by HOME or passwd; set state_dir '
                        '(pid_file, log_file) in [TORQUE] to a whole path')
    return os.path.join(os.path.dirname(os.path.realpath(path)), expanded)


def read_files(path, overrides):
    """Return the values of the defaults, of the user's files over them, and of -D over all.

    Beside a torque.ini may lie the config.ini that the programs of pyrocore share. -D says
    KEY=VALUE of [TORQUE], or section.KEY=VALUE.
    """
    ini = Ini()
    ini.read(DEFAULTS, NO_INI)
    common = beside(path, 'config.ini')
    if os.path.isfile(common):
        try:
            ini.read(read_text(common), common, common=True)
            ini.remark(one_line(f'{common} is read first, for [GLOBAL] scgi_url, rtorrent_rc, '
                                '[INFLUXDB], [ANNOUNCE]'))
        except Mistakes as error:
            ini.remark(str(error), logging.WARNING)
    if path == NO_INI:
        ini.remark(f"there is no {' or '.join(expanded(INI_FILES))}: the defaults are run; "
                   'torque.ini.example shows what there is to set')
    else:
        ini.read(read_text(path), path)
    for text in overrides:
        section, _, rest = text.partition('.')
        if section.upper() not in ini.sections:
            section, rest = 'TORQUE', text
        ini.read(f'[{section}]\n{rest}', '-D')
    return ini


def state_folder(path, name):
    """Return the folder of state of a configuration file, which may name it."""
    import hashlib
    if name:
        return beside(path, name)
    base = beside(path, os.environ.get('XDG_STATE_HOME') or '~/.local/state')
    folder = 'default'
    if path != NO_INI:
        real = os.path.realpath(path)
        mark = hashlib.sha256(os.fsencode(real)).hexdigest()[:8]
        folder = f'{os.path.basename(real)}-{mark}'
    return os.path.join(base, 'torque', folder)


def where_it_belongs(key, ini):
    """Return what to write instead of a key of [TORQUE] that has no effect there."""
    stem, _, rest = key.partition('.')
    right = ''
    if stem.lower() in ('job', 'jobs'):
        right = f'job.{rest}'
    elif f'job.{stem}.handler' in ini.torque:
        right = f'job.{key}'
    for name, job in (('queue', QueueManager), ('treewatch', TreeWatch), ('fluxstats', InfluxDB)):
        if key in option_names(job.options):
            right = f'job.{name}.{key}'
    if JOB_SETTING.fullmatch(right):
        return f'; did you mean {right!r}?'
    if right or key in CORE_NAMES:
        return f'; settings of a job are {FORM}'
    return nearest(key, TORQUE_NAMES) or f'; settings of a job are job.NAME.{key}'


def group_jobs(ini):
    """Return the values of each job by name; tell of those that torque has no use for."""
    groups: dict = {}
    for key, value in ini.torque.items():
        setting = JOB_SETTING.fullmatch(key)
        family = key.partition('.')[0]
        if setting:
            groups.setdefault(setting[1], {})[setting[2]] = value
        elif family == 'job':
            ini.refuse(value, f'allowed is {FORM}')
        elif key in TORQUE_NAMES:
            continue
        elif OLD_KEYS.match(key):
            ini.unused.add(f'{family}.*')
        else:
            ini.warn(value, f'this means nothing to torque{where_it_belongs(key, ini)}')
    return groups


def tell_of_sections(ini):
    """Tell of sections, and of settings in them, that have no effect."""
    for section, values in ini.sections.items():
        if OLD_SECTION.fullmatch(section):
            ini.unused.add(f'[{section}]')
        elif section not in SECTIONS:
            first, *_ = values.values()
            hint = nearest(section, SECTIONS) or '; settings and jobs belong under [TORQUE]'
            ini.warn(first, f'section [{section}] means nothing to torque{hint}')
            continue
        for key, value in values.items():
            if section not in ('TORQUE', InfluxDB.section) and (
                    key.startswith('job.') or key in TORQUE_NAMES):
                ini.warn(value, f'no effect under [{section}]; it belongs under [TORQUE]')


def checked(options, values, ini, prefix='', shared=()):
    """Return what the values mean to options; those left out are as in `shared`, or default.

    Other values are as pyrocore's jobs expect them: digits as int, words of truth as bool.
    """
    meanings = Settings(values)
    place = ('', 0)
    for name, text in values.items():
        place = text.place
        # Python refuses to convert more
        if re.fullmatch('[0-9]{1,4000}', text):
            meanings[name] = int(text)
        elif text.lower() in ('true', 'yes', 'on', 'false', 'no', 'off'):
            meanings[name] = parse_bool(text)
    inherited = dict(shared)
    given = {**inherited, **values}
    for option in options:
        default = Value(option.default, place, prefix + option.name)
        text = given.get(option.name, given.get(option.alias, default))
        if option.name in values and option.alias in values:
            ini.warn(values[option.alias], f'another name of {option.name}, and that counts')
        meanings[option.name] = None
        if option.kind != 'text' and not text:
            # It is as if it were left out.
            text = inherited.get(option.name) or default
            if not text:
                continue
        try:
            meanings[option.name] = option.parse(text)
        # Those of others may be int() or float()
        except (UserError, ValueError, TypeError) as error:
            ini.refuse(text, error)
    return meanings


def check_names(job, values, section, tell):
    """Tell what is no option of a built-in job, among its settings and in its section."""
    own = option_names(job.options)
    for settings, known, otherwise in (
            (values, CORE_NAMES + own, '; see --list-jobs'),
            (section, own, '; a setting of torque or of jobs belongs under [TORQUE]')):
        for key, value in settings.items():
            if key not in known and not key.startswith(job.families):
                hint = nearest(key, known) or otherwise
                tell(value, f'{job.__name__} has no such option{hint}')


def import_handlers(path, groups, only, ini):
    """Return the classes of active jobs, and that of `only`, by name; None: it is not there.

    All are imported at first: each module may add fields that others' conditions name.
    """
    classes: dict = {}
    sys.path.append(os.path.dirname(os.path.realpath(path)))
    with_handler = [name for name, values in groups.items() if values.get('handler')]
    for name, values in groups.items():
        active = values.get('active', 'yes')
        if not active:
            # It has replaced a `no` of the defaults.
            ini.refuse(active, 'is empty; allowed are yes and no')
        if name != only and active.lower() in FALSE:
            continue
        if name in with_handler:
            classes[name] = None
            # What is wrong is told when the job is planned
            with contextlib.suppress(UserError):
                classes[name] = import_handler(values['handler'])
        elif only in (None, name):
            first = next(iter(values.values()))
            place = values.get('handler', first).place
            hint = nearest(name, with_handler) or '; a job needs a handler and a schedule'
            ini.refuse(Value('', place, f'job.{name}'), f'has no handler{hint}')
    return classes


class PlannedJob(NamedTuple):
    """A job that can be made."""
    name: str
    make: Callable[[Settings], Any]
    config: Settings
    schedule: Schedule
    source: dict[str, Value]            # its settings as they are written


class Config(Settings):
    """The loaded configuration: engine, torque, other sections in lower case.

    Empty at import; load() fills it in place, so `from torque import config_ini` is safe.
    """
    make_engine: Any = Engine           # --demo has another

    def load(self, path, overrides=(), dry_run=False, only=None):
        """Read a file and plan its active jobs, or `only` one; raises Mistakes."""
        ini = read_files(path, overrides)
        self.path = path
        self.remarks = ini.remarks
        tell_of_sections(ini)
        groups = group_jobs(ini)
        if ini.unused:
            ini.remark(f"what pyrocore alone has a use for: {' '.join(sorted(ini.unused))}")
        if only is not None and only not in groups:
            raise UnknownJob(f"there is no job {only!r}; the jobs are {' '.join(sorted(groups))}"
                             f'{nearest(only, groups)}')
        self.fill(ini, dry_run)
        classes = import_handlers(path, groups, only, ini)
        self.jobs: list[PlannedJob] = []
        for name, values in groups.items():
            if name in classes and only in (None, name):
                self.jobs.append(self.plan(name, classes[name], values, ini, bool(only)))
                continue
            job = BUILT_IN.get(handler_name(values.get('handler', '')))
            if values.get('scgi_url'):
                # No job of this run, but its items have data that others must not touch.
                self.engine_at(values['scgi_url'], self.torque.same_files, ini)
            # A slip may be why it is not active
            if only is None and job:
                check_names(job, values, ini.sections.get(job.section, {}), ini.warn)
        ini.raise_mistakes()

    def fill(self, ini, dry_run):
        """Replace the sections by those of the files, and find what all jobs share."""
        self.clear()
        for section, values in ini.sections.items():
            self[section.lower()] = Settings(values)
        self['torque'] = torque = checked(TORQUE_OPTIONS, ini.torque, ini)
        torque['dry_run'] = bool(torque.dry_run or dry_run)
        self.state_dir = state_folder(self.path, torque.state_dir)
        host = torque['httpd.host']
        # Others must not reach a page that everybody may read.
        if torque['httpd.active'] and not torque['httpd.password'] and not LOOPBACK.match(host):
            ini.refuse(ini.torque['httpd.host'], f'{host!r} is reached from elsewhere; that needs '
                                                 'httpd.password')
        self.engines = {}                   # by address and same_files
        place = ini.torque.get('rtorrent_rc', Value('', (self.path, 0))).place
        self.url = ini.torque.get('scgi_url', Value('', place, 'scgi_url'))
        self.engine = self.engine_at(self.url, torque.same_files, ini)

    def plan(self, name, make, values, ini, alone):
        """Return a job ready to be made, if there are no mistakes."""
        options: tuple = CORE_OPTIONS
        shared = {key: value for key, value in ini.torque.items() if key in TORQUE_NAMES}
        if isinstance(make, type) and issubclass(make, Job) and make.options is not None:
            # The last of a name counts, so that no job gives those of all another meaning.
            options = (*make.options, *CORE_OPTIONS)
            section = ini.sections.get(make.section, {})
            check_names(make, values, section, ini.refuse)
            shared.update(section)
        settings = checked(options, values, ini, f'job.{name}.', shared)
        schedule = settings.schedule
        settings.update(job_name=name, dry_run=bool(settings.dry_run or self.torque.dry_run),
                        handler=values.get('handler'), schedule=values.get('schedule'))
        engine = self.engine_at(values.get('scgi_url') or self.url, settings.same_files, ini)
        config = Settings(settings, engine=engine, engines=self.engines.values(),
                          state_dir=self.state_dir, alone=alone)
        return PlannedJob(name, make, config, schedule, values)

    def engine_at(self, url, same_files, ini):
        """Return the Engine at an address: one for all jobs that name the same."""
        made_of = (str(url), bool(same_files))
        # Where there are mistakes, an address may be among what was not understood.
        if made_of not in self.engines and (url or not ini.mistakes):
            aliases = {name: text.split() for name, text in self.announce.items()}
            try:
                address = url or find_url(self.torque.rtorrent_rc)
                self.engines[made_of] = self.make_engine(
                    address, self.torque.rpc_timeout, self.torque.rpc_limit, aliases, made_of[1])
            except UserError as error:
                ini.refuse(url, error)
        return self.engines.get(made_of)


def clean_up(name, job, way='cleanup'):
    """Call a job's cleanup(), or end_run(), if it has one, whatever comes of it."""
    try:
        if hasattr(job, way):
            getattr(job, way)()
    except BaseException as error:
        logging.getLogger('torque.' + name).error('%s failed: %s', way, origin(error))


def require_run(run):
    """Raise UserError where what a job has as run() cannot be called, or would do nothing."""
    import inspect
    if not callable(run):
        raise UserError('the class has no run()')
    if (inspect.iscoroutinefunction(run) or inspect.isgeneratorfunction(run)
            or inspect.isasyncgenfunction(run)):
        raise UserError('run() is async or holds a yield: calling it would do nothing')
    try:
        inspect.signature(run, follow_wrapped=False).bind()
    except (TypeError, ValueError) as error:
        raise UserError(f'run() is called without arguments: {error}') from None


def make_job(planned):
    """Return the object of a job; raises UserError."""
    try:
        job = planned.make(planned.config)
    # rTorrent may be there the next time
    except (UserError, Unreachable):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f'it cannot be made: {origin(error)}') from None
    if planned.make not in BUILT_IN.values():
        require_run(getattr(job, 'run', None))
    return job


def make_jobs(plans):
    """Return job objects by name; raises Mistakes, and cleans up what was made until then."""
    made = {}
    ini = Ini()
    try:
        for planned in plans:
            name, source = planned.name, planned.source
            try:
                made[name] = make_job(planned)
            except UserError as error:
                key = f'job.{name}.{error.option}'.rstrip('.')
                value = source.get(error.option, source['handler'])
                for written in source.values():
                    # A default stands in no file of the user
                    if value.place[0] == NO_INI:
                        value = written
                ini.refuse(Value(value, value.place, key), error)
        ini.raise_mistakes()
    except BaseException:
        for name, job in made.items():
            clean_up(name, job)
        raise
    return made


config_ini = Config()


# --- Daemon ----------------------------------------------------------------------------------
# The life of the process, from the lock on its pid file to its end or its start over. Planned
# jobs enter; runs, a log, the status at a socket and pings of monitors leave. The scheduler is
# the main thread's. The status, each monitor, each cleanup, the check before a reload and the
# search for an rTorrent that is away have threads of their own, which only read what is the main
# thread's, or put into scheduler.calls.

STATUS_TIMEOUT = 10             # seconds that a daemon has to tell its status
STATUS_LIMIT = 16 << 20         # bytes of it that are read
STATUS_KEYS = {'grace', 'jobs', 'started'}      # that it has to have
RARE = 600                      # seconds of a pause between due times
AWAY_PAUSE = 4                  # seconds until an rTorrent that is away is tried again
CHECK_TIMEOUT = 60              # seconds that the check of the files may take before a reload
LOCK = 'TORQUE_LOCK'            # environment: descriptor of the locked pid file, at a start over
BYTE_CODE = __file__.endswith('.pyc')           # this runs from byte code


def make_task(planned, run):
    """Return the task of a job, which is done by a function."""
    task = Task(planned.name, planned.schedule, run, planned.config.max_runtime)
    task.log.setLevel(planned.config.log_level or 'NOTSET')
    task.dry_run = planned.config.dry_run
    return task


class AlreadyRunning(LoggableError):
    """Another daemon has the lock."""
    exit_status = EXIT_RUNNING


class PidFile:
    """The file with the daemon's pid, which keeps it locked, and the socket beside it.

    The lock says whether a daemon runs, the kernel says who answers at the socket: what is
    written in the file never decides whom a signal is sent to.
    """

    def __init__(self, path):
        self.path = path
        self.socket = path + '.sock'
        self.file = -1                          # descriptor, while we hold the lock
        if len(os.fsencode(self.socket)) > 107:
            raise UserError(f'pid_file {path}: the name of the socket beside it is longer than '
                            'the 107 bytes that it may have; set pid_file to a shorter path')

    def inherit(self):
        """Take over the lock from the program that this process was until now, if any."""
        if LOCK not in os.environ:
            return False
        # flock() belongs to the open file: opened anew, it would be refused even to its holder.
        self.file = int(os.environ.pop(LOCK))
        os.set_inheritable(self.file, False)
        return True

    def keep(self):
        """Lock the file and write our pid, where that is not done; False where another has it."""
        # A file that was removed or replaced still has our lock, and keeps nobody out.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self.path), os.fstat(self.file)):
                return True
        file = self.open(os.O_RDWR | os.O_CREAT)
        if not re.fullmatch(rb'[\s\0\d]{0,64}', os.pread(file, 65, 0)):
            os.close(file)
            raise UserError(f'pid file {self.path}: this is something else; it is left alone')
        with writing(self.path):
            # A process that only looks, in is_locked(), has the lock for a moment.
            free = lock(file, 0.2)
        if not free:
            os.close(file)
            return False
        if self.file >= 0:
            os.close(self.file)
        self.file = file
        with contextlib.suppress(OSError):
            # On a full disk the lock alone has to do.
            os.ftruncate(file, 0)
            os.pwrite(file, b'%d\n' % os.getpid(), 0)
        return True

    def open(self, flags) -> int:
        """Open the file, if it is a plain one of this user; root may read those of others."""
        with writing(self.path):
            file = open_own(self.path, flags)
        status = os.fstat(file)
        users = [os.geteuid()]
        if flags == os.O_RDONLY and users == [0]:
            users.append(status.st_uid)
        if status.st_uid in users and stat.S_ISREG(status.st_mode):
            return file
        os.close(file)
        raise UserError(f'{self.path}: this is no file of your own; it is left alone')

    def is_locked(self):
        """Tell whether a daemon runs."""
        import fcntl
        with writing(self.path):
            if identity(self.path) is None:
                return False
            with open(self.open(os.O_RDONLY)) as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
        return False

    def read(self) -> tuple[int, str]:
        """Return the owner of the file, and what is written in it."""
        with open(self.open(os.O_RDONLY), encoding='ascii', errors='replace') as stream:
            owner = os.fstat(stream.fileno()).st_uid
            return owner, stream.read(20).strip()

    def connect(self, seconds):
        """Return a connection to the daemon, and its pid."""
        try:
            sock = connect(Address('unix', self.socket, self.socket), seconds)
        except OSError as error:
            raise LoggableError('torque is starting, or cannot be reached at '
                                f'{self.socket}: {error}') from None
        pid, user = listener(sock)
        allowed = user == os.geteuid()
        if os.geteuid() == 0 and not allowed:
            # Root may speak with one whose user owns the pid file, and whose pid it holds.
            owner, text = self.read()
            allowed = owner == user and text == str(pid)
        # One in another pid namespace has no pid here; 0 would be our whole process group.
        if not allowed or pid <= 0:
            sock.close()
            raise LoggableError(f'{self.socket}: a process of another user answers, or one in '
                                'a container; it is left alone')
        return sock, pid

    def ask(self, seconds=STATUS_TIMEOUT) -> dict:
        """Return what the running daemon says of itself."""
        status = None
        sock, pid = self.connect(seconds)
        with sock, contextlib.suppress(RpcError, OSError, ValueError, RecursionError):
            status = json.loads(receive(sock, seconds, STATUS_LIMIT))
        if not isinstance(status, dict) or not status.keys() >= STATUS_KEYS:
            raise LoggableError(f'process {pid} does not tell its status over {self.socket}')
        return status

    def signal(self, number):
        """Send a signal to the running daemon; return its pid."""
        sock, pid = self.connect(STATUS_TIMEOUT)
        sock.close()
        os.kill(pid, number)
        return pid

    def stop(self):
        """End a running daemon, if there is one; returns when it is gone."""
        if not self.is_locked():
            return
        seconds = 30.0
        with contextlib.suppress(LoggableError):
            seconds += self.ask(2)['grace']
        pid = self.signal(signal.SIGTERM)
        end = elapsed_time() + seconds
        # A supervisor may have started the next one already, which is not waited for.
        while self.is_locked() and os.path.exists(f'/proc/{pid}'):
            if elapsed_time() > end:
                raise LoggableError(f'process {pid} has not ended in {seconds:g} s')
            time.sleep(0.02)


def start_file(planned) -> str:
    """Return the file whose time is when a job was last started; '' where none is kept.

    Of what never pauses for longer than RARE nobody needs to hear that it was missed, unless it
    is to be made up for.
    """
    if planned.schedule.elapsed or planned.config.dry_run:
        return ''
    due: Any = time.time()
    # It may be due several times in a row before it pauses
    for _ in range(12):
        before, due = due, planned.schedule.next(due)
        if planned.config.catch_up or due is None or due - before > RARE:
            return planned.config.state_file('start')
    return ''


class Monitor:
    """Tells a server of the runs of a job, in a thread of its own: a deaf one delays nothing."""
    MOST_WAITING = 100                          # pings; more are dropped

    def __init__(self, url):
        self.base, self.mark, self.query = url.partition('?')
        self.repeats = Repeats()
        self.pings: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = in_thread(self.work)

    def send(self, way, text=''):
        """Queue one ping."""
        body = scrubbed(text[:10000])
        if self.pings.qsize() < self.MOST_WAITING:
            url = self.base.rstrip('/') + way + self.mark + self.query
            self.pings.put((url, body.encode('utf-8', 'replace')))

    def work(self):
        """Send pings, one after another, until there comes None; a thread."""
        for url, body in iter(self.pings.get, None):
            trouble = ''
            try:
                answer = http_post(url, body, {}, 10)
                if answer.status >= 300:
                    trouble = f'HTTP {answer.status} {answer.reason}'
            except Exception as error:
                trouble = str(error)
            if trouble and self.repeats.deserve_line((url, trouble)):
                logging.getLogger('torque.ping').warning('%s: %s', url, trouble)


def systemd_notify(state):
    """Tell systemd our state, when it wants to know (sd_notify)."""
    # @ stands for the NUL that names of abstract sockets begin with, sd_notify(3).
    address = re.sub('^@', '\0', os.environ.get('NOTIFY_SOCKET', ''))
    if not address:
        return
    # There may be no more open files.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), address)


def end_process(status):
    """End the process at once: Python itself would wait for threads and children of jobs."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def find_secret(config):
    """Return the name of a setting that holds a secret, '' where there is none."""
    for section in config.values():
        for key, shown in section.without_secrets().items():
            if shown != section[key]:
                return key
    return ''


def missing_zone() -> list[str]:
    """Return a warning where TZ names a time zone that this machine does not have."""
    name = os.environ.get('TZ', '').lstrip(':')
    path = os.path.join(os.environ.get('TZDIR', '/usr/share/zoneinfo'), name)
    # The C library takes UTC for it, without a word; rules such as UTC0 need no file
    if time.timezone or re.search(r'UTC|GMT|\d', name) or os.path.exists(path):
        return []
    return [f'TZ={quoted(name)} is no time zone of this machine: times are UTC']


def warn_of_risks(config, jobs):
    """Log what lets others read secrets or run commands as this user, and a missing time zone."""
    risks = missing_zone()
    secret = find_secret(config)
    if secret and others_may(0o044, config.path):
        risks.append(f'{config.path} holds {secret} and can be read by others: chmod 600')
    if others_may(0o002, config.state_dir):
        risks.append(f'{config.state_dir}, the state folder, can be written by every user: '
                     'chmod 700')
    for engine in config.engines.values():
        address = engine.address
        if address.kind == 'unix' and others_may(0o002, address.path):
            risks.append(f'{address.where} is open to every user of this machine: each runs '
                         'commands as you')
        if address.exposed:
            risks.append(f'{address.where}: the RPC port of rTorrent may be open to the network: '
                         'whoever reaches it runs commands as you; bind it to 127.0.0.1 or use a '
                         'socket')
    for job in jobs:
        if hasattr(job, 'risks'):
            risks += job.risks()
    for text in dict.fromkeys(risks):
        logging.getLogger('torque.main').warning('%s', text)


def own_command(program, *more):
    """Return the words that this process was started with, for another program."""
    # Python itself does not keep all flags: -u and -X are nowhere in sys.flags as they stood.
    with open('/proc/self/cmdline', encoding='utf-8', errors='surrogateescape') as stream:
        words = stream.read().split('\0')[:-1]
    flags = words[1:len(words) - len(sys.argv)]
    if flags[-1:] == ['-m']:
        # The name of a module followed; now it is that of a file.
        flags.pop()
    return [sys.executable, *flags, program, *sys.argv[1:], *more]


def run_from_byte_code():
    """Start over from byte code, where that can be.

    Python keeps the syntax tree of a script in memory as long as it runs: 16 MiB.
    """
    if BYTE_CODE or __name__ != '__main__' or sys.dont_write_bytecode:
        return
    # Whatever is in the way, it goes on from source.
    with contextlib.suppress(Exception):
        import py_compile
        # Made anew each time, so that no stale one is ever run.
        path = str(py_compile.compile(__file__, doraise=True))
        os.execv(sys.executable, own_command(path))


def engine_status(engine) -> dict:
    """Return the state of an rTorrent, for --status."""
    since, away_for = engine.gone_since, None
    if since is not None:
        away_for = elapsed_time() - since
    return {'address': engine.address.where, 'version': engine.version or None,
            'away_for': away_for}


class Daemon:
    """A running torque: its jobs, their tasks, and what it tells of itself."""
    TOLD = ('pid', 'started', 'starting', 'stopping', 'reloading', 'refusals', 'mistakes')
    server: socket.socket | None = None
    checker: Any = None                         # the child that checks the files
    starting = True
    stopping = False
    reloading = False
    refusals = 0                                # reloads that were refused
    mistakes: list[str] = []                    # of the last one
    exit_status = EXIT_OK

    def __init__(self, config, pid_file):
        self.config = config
        self.pid_file = pid_file
        self.folder = os.getcwd()               # a job may go to another one
        self.path = os.path.realpath(config.path)
        self.pid = os.getpid()
        self.log = logging.getLogger('torque.main')
        self.scheduler = Scheduler()
        self.monitors: dict[str, Monitor] = {}  # by URL
        self.repeats = Repeats()
        self.began = elapsed_time()
        self.started = time.time()
        self.jobs = {}
        self.sought: set[Engine] = set()        # rTorrents that are away
        self.missed = []        # what was due while torque did not run
        self.at_end = []        # what else is to be done at the end

    def begin(self):
        """Make the jobs and their tasks; from now on signals and questions are answered."""
        os.register_at_fork(after_in_child=self.leave_child)
        signal.signal(signal.SIGHUP, self.on_signal)
        self.listen()
        self.jobs = make_jobs(self.config.jobs)
        signal.signal(signal.SIGTERM, self.on_signal)
        signal.signal(signal.SIGINT, self.on_signal)
        for planned in self.config.jobs:
            self.scheduler.add(self.task(planned))

    def leave_child(self):
        """Let a process that a job forks have none of what is the daemon's."""
        os.close(self.pid_file.file)
        if self.server:
            self.server.close()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    def on_signal(self, number, frame):
        """End, or reload, soon; a second Ctrl-C does not wait for runs or cleanups in progress."""
        if number == signal.SIGHUP:
            self.scheduler.calls.put(self.reload)
            return
        if self.stopping and number == signal.SIGINT:
            self.scheduler.hurry = True
        self.stopping = True
        self.scheduler.calls.put(self.scheduler.stop)

    def task(self, planned):
        """Return the task of a job."""
        config = planned.config
        url = config.ping_url
        if url and url not in self.monitors:
            self.monitors[url] = Monitor(url)
        monitor = self.monitors.get(url)
        path = start_file(planned)
        run = functools.partial(self.run_job, planned, path, monitor)
        task = make_task(planned, run)
        job = self.jobs[planned.name]
        task.at_start = getattr(job, 'at_start', False)
        if path and self.was_missed(planned, path):
            text = planned.name
            if config.catch_up:
                task.at_start = True
                text += ' (made up for now)'
            self.missed.append(text)
        return task

    def was_missed(self, planned, path):
        """Tell whether a run came due since the last start, while torque was not running."""
        try:
            # A clock that was wrong may have left a time to come.
            start = min(os.lstat(path).st_mtime, self.started)
        except OSError:
            # What is missed of a new job is missed from now on.
            self.mark_start(path)
            return False
        due = planned.schedule.next(start)
        return due is not None and due <= self.started

    def mark_start(self, path):
        """Give a file the time of now; a disk that is full must not stop a job."""
        now = time.time()
        try:
            replace_file(path, '')
            # Left alone, its time would be that of a file server, or some milliseconds behind.
            os.utime(path, (now, now))
        except (LoggableError, OSError) as error:
            if self.repeats.deserve_line('start'):
                self.log.warning('%s', error)

    def run_job(self, planned, path, monitor: Monitor | None):
        """Run a job, and tell disk and monitor of it; in the thread of that job."""
        if path:
            # It is on the disk before the job does anything.
            self.mark_start(path)
        if planned.config.dry_run:
            monitor = None
        if monitor:
            monitor.send('/start')
        try:
            self.jobs[planned.name].run()
        except BaseException as error:
            if monitor:
                monitor.send('/fail', f'{type(error).__name__}: {error_text(error)}')
            raise
        finally:
            self.seek_engines()
        if monitor:
            monitor.send('')

    def seek_engines(self):
        """Have a thread look for each rTorrent that is away: a late one need not wait for a run."""
        for engine in self.config.engines.values():
            if engine.is_away and engine not in self.sought:
                # There may be no more threads.
                with contextlib.suppress(RuntimeError):
                    in_thread(self.seek, engine)
                    self.sought.add(engine)

    def seek(self, engine):
        """Try an rTorrent until it answers; a thread, for one that hangs answers late."""
        while engine.is_away:
            time.sleep(AWAY_PAUSE)
            with contextlib.suppress(RpcError):
                engine.reach()
        self.sought.discard(engine)

    def serve(self, verb):
        """Run jobs on schedule until a signal comes, and what then has to be done."""
        if os.geteuid() == 0:
            self.log.warning('torque runs as root; the user of rTorrent is enough')
        warn_of_risks(self.config, self.jobs.values())
        names = []
        for name, task in sorted(self.scheduler.tasks.items()):
            if task.dry_run:
                name += ' (dry run)'
            names.append(name)
        self.log.info('%s with %s', verb, ', '.join(names) or 'no active job')
        if self.missed:
            self.log.info('missed while torque was not running: %s', ', '.join(self.missed))
        self.starting = False
        systemd_notify('READY=1')
        self.scheduler.serve(self.look_after_pid_file)
        if not self.reloading:
            systemd_notify('STOPPING=1')
        hung = ', '.join(self.finish())
        if self.reloading and not self.stopping:
            self.start_over(hung)
        # Else it is another daemon's socket by now.
        if self.exit_status != EXIT_RUNNING:
            with contextlib.suppress(OSError):
                os.remove(self.pid_file.socket)
        if hung:
            hung = '; cut short: ' + hung
        self.log.info('stopped%s', hung)

    def finish(self):
        """Let runs in progress end, clean up; return the names of jobs that still run."""
        grace = self.config.torque.grace
        end = elapsed_time() + grace
        if self.checker:
            self.checker.kill()
        running = [task.name for task in self.scheduler.running()]
        if running:
            self.log.info('stopping; %s may run for %g s more', ', '.join(running), grace)
        hung = {task.name for task in self.scheduler.finish(grace)}
        for name in hung:
            clean_up(name, self.jobs[name], 'end_run')
        if self.scheduler.hurry:
            # That was for the runs; cleanups have a moment, unless it comes once more.
            self.scheduler.hurry, end = False, 0.0
        end = max(end, elapsed_time() + 0.8)
        hung |= self.clean_up(self.jobs.keys() - hung, end)
        for function in self.at_end:
            with contextlib.suppress(LoggableError):
                function()
        # A deaf monitor is not waited for longer.
        end = min(end, elapsed_time() + 3)
        for monitor in self.monitors.values():
            monitor.pings.put(None)
            self.join(monitor.thread, end)
        return sorted(hung)

    def join(self, thread, end):
        """Wait for a thread, until then or until a second Ctrl-C."""
        while thread.is_alive() and not self.scheduler.hurry and elapsed_time() < end:
            thread.join(0.1)

    def clean_up(self, names, end):
        """Have jobs clean up, until then; return the names of those that still do."""
        threads = {}
        for name in names:
            # Each has a thread of its own, because it may take for ever.
            try:
                threads[name] = in_thread(clean_up, name, self.jobs[name])
            except RuntimeError:
                clean_up(name, self.jobs[name])
        for thread in threads.values():
            self.join(thread, end)
        return {name for name, thread in threads.items() if thread.is_alive()}

    def look_after_pid_file(self):
        """Make pid file and socket again where somebody removed them; end for another daemon."""
        try:
            ours = self.pid_file.keep()
        except UserError as error:
            if self.repeats.deserve_line('pid file'):
                self.log.warning('%s', error)
            return
        if not ours:
            self.log.error('another torque has %s by now: this one ends', self.pid_file.path)
            self.exit_status = EXIT_RUNNING
            self.stopping = True
            self.scheduler.stop()
        elif not os.path.exists(self.pid_file.socket):
            self.listen()

    def reload(self):
        """Have the files checked, by a child, and start over if there are no mistakes in them."""
        if not self.reloading:
            in_thread(self.check_files)
            self.reloading = True
            systemd_notify(f'RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}')

    def check_files(self):
        """Have the main thread do what the check of the files calls for; a thread."""
        self.mistakes = self.find_mistakes()
        action = self.scheduler.stop
        if self.mistakes:
            action = self.refuse
        self.scheduler.calls.put(action)

    def find_mistakes(self) -> list[str]:
        """Return what a new program has to say against the files as they are now."""
        # A new process has no module in memory: torque.py and those of jobs are read as they are.
        try:
            import subprocess
            self.checker = checker = subprocess.Popen(
                own_command(__file__, '--check-files'), cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            told = checker.communicate(timeout=CHECK_TIMEOUT)[1]
        except OSError as error:
            return [f'the files cannot be checked: {error.strerror}']
        except subprocess.TimeoutExpired:
            checker.kill()
            return [f'the check of the files took longer than {CHECK_TIMEOUT} s']
        status = checker.returncode
        if status == EXIT_OK:
            return []
        lines = told.decode('utf-8', 'replace').splitlines()
        return lines or [f'torque.py ended with status {status}']

    def refuse(self):
        """Go on as before, for there are mistakes in the files."""
        self.refusals += 1
        self.reloading = False
        for line in self.mistakes:
            self.log.error('not reloaded: %s', line)
        systemd_notify('READY=1')

    def start_over(self, hung):
        """Become a new torque: same process, same lock, everything else from the disk."""
        if hung:
            self.log.warning('cut short by the reload: %s', hung)
        # Until the new program has its handlers, SIGHUP would end it; ignored it stays ignored.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if self.stopping:
            # SIGTERM came just now, in the last moment when it is noticed.
            return
        try:
            os.chdir(self.folder)
            os.set_inheritable(self.pid_file.file, True)
            os.environ[LOCK] = str(self.pid_file.file)
            # All threads end here, and all that is open is closed, but for the lock.
            logging.shutdown()
            os.execv(sys.executable, own_command(__file__))
        except OSError as error:
            self.log.error('cannot start over: %s', error)
            self.exit_status = EXIT_FAILED

    def listen(self):
        """Open the socket that tells the status, served by a thread of its own."""
        if self.server:
            with contextlib.suppress(OSError):
                # This ends accept() in the thread of the socket.
                self.server.shutdown(socket.SHUT_RDWR)
            self.server.close()
        self.server = server = socket.socket(socket.AF_UNIX)
        try:
            # Linux makes the socket's file with the mode of the descriptor: at no moment can
            # anybody else connect.
            os.fchmod(server.fileno(), 0o600)
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.pid_file.socket)
            server.bind(self.pid_file.socket)
            server.listen()
            in_thread(self.answer, server)
        except (OSError, RuntimeError) as error:
            self.log.warning('no --status and --reload: %s: %s', self.pid_file.socket, error)

    def answer(self, server):
        """Tell the status to whoever connects, one after another; a thread."""
        while server.fileno() >= 0:
            try:
                sock, _ = server.accept()
            except OSError:
                # The socket is closed, or there can be no more open files.
                time.sleep(0.5)
                continue
            with contextlib.suppress(Exception), sock:
                # Who does not read is not waited for: the next may be a person.
                sock.settimeout(2)
                text = json.dumps(self.status())
                sock.sendall(text.encode())
                # Closing is no end while a child that a job has just forked has a copy.
                sock.shutdown(socket.SHUT_RDWR)

    def status(self) -> dict:
        """Return the state of the daemon, its rTorrents and its jobs; times in Unix seconds."""
        handler = logging.getLogger().handlers[0]
        jobs = []
        for _, task in sorted(self.scheduler.tasks.items()):
            job = {name: getattr(task, name) for name in task.TOLD}
            job['next_run'] = self.scheduler.next_run(task)
            jobs.append(job)
        return {
            **{name: getattr(self, name) for name in self.TOLD},
            'version': VERSION,
            'config': self.path,
            'log_file': getattr(handler, 'baseFilename', None),
            'uptime': elapsed_time() - self.began,
            'grace': self.config.torque.grace,
            'rtorrent': list(map(engine_status, self.config.engines.values())),
            'jobs': jobs}


def print_table(rows):
    """Print rows in columns."""
    rows = [[*map(one_line, map(str, row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(map(str.ljust, row, widths)).rstrip())


COLUMNS = {                     # of the table of jobs
    'name': 'JOB',
    'state': 'STATE',
    'last_start': 'LAST RUN',
    'last_duration': 'TOOK',
    'runs': 'RUNS',
    'failures': 'FAILED',
    'missed': 'MISSED',
    'next_run': 'NEXT RUN',
    'last_error': 'LAST ERROR'}


def status_cell(key, value):
    """Return what the table of jobs shows in a column."""
    if value is None:
        return '-'
    if key == 'last_duration':
        return show_duration(value)
    if key in ('last_start', 'next_run'):
        return time.strftime('%m-%d %H:%M:%S', time.localtime(value))
    return str(value)


def engine_line(address, version: str | None, away_for: float | None):
    """Return a line about an rTorrent."""
    if away_for is not None:
        state = f'has not answered for {show_duration(away_for)}'
    elif version:
        state = 'answers'
    else:
        state = 'not asked yet'
    name = f"rTorrent {version or ''}".rstrip()
    return f'{name} at {address}: {state}'


def print_status(status):
    """Print a daemon's status as a table."""
    up = show_duration(status['uptime'])
    line = f"torque {status['version']}, pid {status['pid']}, up {up}, {status['config']}"
    if status['log_file']:
        line += f", log {status['log_file']}"
    for word in ('reloading', 'stopping'):
        if status[word]:
            line += f', {word}'
    print(one_line(line))
    for engine in status['rtorrent']:
        print(one_line(engine_line(**engine)))
    for text in status['mistakes']:
        print(one_line(f'not reloaded: {text}'))
    rows = [list(COLUMNS.values())]
    for job in status['jobs']:
        # An older torque may answer
        if job.get('dry_run'):
            job['state'] += ', dry run'
        rows.append([status_cell(key, job[key]) for key in COLUMNS])
    print_table(rows)


def detach():
    """Go into the background; return the descriptor that report_start() writes to.

    The process that was started waits for that, so that what goes wrong at the start still
    reaches the terminal.
    """
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        # It is not read to its end, because a child of a job may have it open.
        status = os.read(reader, 16) or EXIT_FAILED
        os._exit(int(status))
    os.close(reader)
    os.setsid()
    # Without a second fork, a terminal that is opened later could become that of the daemon.
    if os.fork():
        os._exit(EXIT_OK)
    return writer


def report_start(writer, status):
    """Let the process that waits end with that status; leave the terminal when all is well."""
    if status == EXIT_OK:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
    with contextlib.suppress(OSError):
        # The first process may have been interrupted.
        os.write(writer, str(status).encode())
    os.close(writer)


# --- Web -------------------------------------------------------------------------------------
# A daemon enters; what a browser or Prometheus may read of it leaves. Nobody changes anything by
# it. Each request has a thread of its own, limits on its size, and a deadline; one more thread
# takes a point of the history every minute. They only read what is the main thread's. Whoever
# asks, an rTorrent is asked at most every FRESH seconds. The stand-in of --demo is here, too.

FRESH = 5.0                     # seconds that figures of an rTorrent may be old
MOST_REQUESTS = 256             # at a time; more are refused
HEAD_LIMIT, HEAD_TIME = 8192, 5.0       # bytes and seconds that a request may take
KEPT_MINUTES = 1440             # of the history
PLOTS = (('last hour', 60, 1), ('last day', KEPT_MINUTES, 5))   # minutes, and those in a point
LOG_SHOWN = 20                  # lines on the page
HISTORY = 'history.json'        # in the state folder
MOST_SHOWN = 300                # characters of any one text on the page
MOST_TRACKERS = 100             # that have figures
HEADERS = '''\
Content-Security-Policy: default-src 'none'; style-src 'self'; script-src 'self'; \
connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'
Cross-Origin-Resource-Policy: same-origin
Cache-Control: no-store
Referrer-Policy: no-referrer
X-Content-Type-Options: nosniff'''
# Command of rTorrent, and the metric that it is; pyrosimple's exporter has the same ones.
METRICS = dict(line.split() for line in '''\
throttle.global_up.rate         upload_bytes_per_second
throttle.global_up.max_rate     upload_limit_bytes_per_second
throttle.global_up.total        upload_bytes_total
throttle.global_down.rate       download_bytes_per_second
throttle.global_down.max_rate   download_limit_bytes_per_second
throttle.global_down.total      download_bytes_total
throttle.max_uploads.global     upload_slots_limit
throttle.max_downloads.global   download_slots_limit
throttle.unchoked_uploads       unchoked_uploads
throttle.unchoked_downloads     unchoked_downloads
network.open_sockets            open_sockets
network.max_open_sockets        open_sockets_limit
network.open_files              open_files
network.max_open_files          open_files_limit
network.http.current_open       open_http_requests
network.http.max_open           open_http_requests_limit
network.total_handshakes        handshakes
pieces.memory.block_count       pieces_memory_blocks
pieces.memory.current           pieces_memory_bytes
pieces.memory.max               pieces_memory_limit_bytes
pieces.memory.sync_queue        pieces_memory_sync_queue_bytes
pieces.sync.queue_size          pieces_sync_queue_length
pieces.preload.type             pieces_preload_type
pieces.preload.min_size         pieces_preload_min_bytes
pieces.preload.min_rate         pieces_preload_min_bytes_per_second
pieces.stats.total_size         pieces_bytes
pieces.stats_preloaded          pieces_preloaded_total
pieces.stats_not_preloaded      pieces_not_preloaded_total
system.files.opened_counter     files_opened_total
system.files.closed_counter     files_closed_total
system.files.failed_counter     files_failed_total'''.splitlines())
# Key of a job's status, the metric, and what it is
JOB_METRICS = [line.split(None, 2) for line in '''\
runs            torque_job_runs_total                   Runs that have ended.
failures        torque_job_failures_total               Runs that have failed.
missed          torque_job_missed_runs_total            Due times merged into others.
last_duration   torque_job_last_duration_seconds        Time that the last run took.
last_start      torque_job_last_start_timestamp_seconds When a run began last.
next_run        torque_job_next_run_timestamp_seconds   When the next run is due.'''.splitlines()]
CSS = '''\
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --text: #1c2127; --dim: #5d6773;
  --line: #e3e7eb; --up: #0a7d55; --down: #2563c9; --bad: #b3261e; --bad-back: #fdecea }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1e2227; --text: #e4e7eb;
  --dim: #98a2ae; --line: #333a42; --up: #4cc79a; --down: #7cacf8; --bad: #ff8a80;
  --bad-back: #3a2220 } }
* { box-sizing: border-box }
body { margin: 0; padding: 1rem; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums }
body.gone::before { content: "torque does not answer: this page is old"; display: block;
  position: sticky; top: .5rem; z-index: 1; padding: .5rem 1rem; border-radius: .4rem;
  background: var(--bad-back); color: var(--bad) }
main { max-width: 70rem; margin: auto; display: grid; gap: 1rem; grid-template-columns: 100% }
h1 { font-size: 1.3rem; margin: 0 }
h2 { font-size: 1rem; margin: 0 }
p { margin: 0 }
.dim, figcaption, .scale, th { color: var(--dim) }
.bad { color: var(--bad) }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem; overflow-x: auto }
.row { display: flex; flex-wrap: wrap; gap: .2rem 2rem; margin-top: .5rem; align-items: baseline }
.row b { font-size: 1.4rem; margin-right: .6rem; white-space: nowrap; font-weight: 600 }
.plots { display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
figure { margin: .8rem 0 0; position: relative; font-size: .8rem }
svg { display: block; width: 100%; height: 6rem; overflow: visible;
  border: solid var(--line); border-width: 1px 0;
  background: linear-gradient(var(--line) 1px, transparent 1px) 0 0 / 100% 50%,
  linear-gradient(90deg, var(--line) 1px, transparent 1px) 0 0 / 25% 100% }
path { fill: none; stroke-width: 1.8; vector-effect: non-scaling-stroke;
  stroke-linecap: round; stroke-linejoin: round }
.up { color: var(--up); stroke: var(--up) }
.down, .free { color: var(--down); stroke: var(--down) }
figcaption, .scale { display: flex; justify-content: space-between; gap: 1rem }
figcaption span span { margin-left: .6rem }
.views { list-style: none; margin: .8rem 0 0; padding: 0; display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)) }
.views li { display: flex; justify-content: space-between; gap: 1rem;
  border-top: 1px solid var(--line) }
table { border-collapse: collapse; width: 100%; margin-top: .3rem }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top;
  overflow-wrap: normal }
th { font-weight: 500 }
th:nth-child(n+4):nth-child(-n+7), td:nth-child(n+4):nth-child(-n+7) { text-align: right }
td { border-top: 1px solid var(--line) }
tr.bad td { background: var(--bad-back) }
tr.error td { border-top: 0; padding-bottom: .5rem; overflow-wrap: anywhere }
td:first-child, th:first-child { padding-left: .4rem; overflow-wrap: anywhere; min-width: 5.5rem }
.next { margin: .3rem 0 0; padding: 0; list-style: none }
.next li { border-top: 1px solid var(--line); padding: .2rem 0; unicode-bidi: isolate }
pre { margin: .3rem 0 0; white-space: pre-wrap; font-size: .8rem }
@media (max-width: 40rem) { body { padding: .5rem; font-size: 14px } main { gap: .6rem }
  section { padding: .7rem } th, td { padding-right: .5rem }
  :is(td, th):is(:nth-child(4), :nth-child(5), :nth-child(7)) { display: none } }
'''
JAVASCRIPT = '''\
'use strict';
async function renew() {
  if (!document.hidden && getSelection().isCollapsed) {
    try {
      const answer = await fetch(location.pathname);
      const page = new DOMParser().parseFromString(await answer.text(), 'text/html');
      document.querySelector('main').replaceWith(page.querySelector('main').cloneNode(true));
      document.body.classList.remove('gone');
    } catch (error) {
      document.body.classList.add('gone');
    }
  }
  setTimeout(renew, 5000);
}
setTimeout(renew, 5000);
'''
PAGE = '''\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>torque</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><link rel="stylesheet" href="torque.css">
<noscript><meta http-equiv="refresh" content="20"></noscript>
<script src="torque.js" defer></script></head>
<body><main>
%s
</main></body></html>
'''
PLOT = '''\
<figure><figcaption><span>{title}</span><span>{scales}</span></figcaption>
<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{title}">
{paths}</svg><div class="scale">{times}</div></figure>
'''


def plausible(figure) -> float:
    """Return a rate or size as it is; nan for anything else."""
    if isinstance(figure, (int, float)) and 0 <= figure < 1 << 63:
        return figure
    return math.nan


class History:
    """Figures of each minute of the last day by name, the newest last; nan where there are none.

    It is kept in a file. `minute` is that of the newest one, in Unix time.
    """

    def __init__(self, path):
        self.path = path
        self.minute = 0
        self.curves = {}
        # Whatever is in the file, it is no reason not to start.
        with contextlib.suppress(Exception), open(path, encoding='ascii') as stream:
            kept = json.load(stream)
            curves = {name: self.curve(map(plausible, figures))
                      for name, figures in kept['curves'].items()}
            self.minute, self.curves = int(kept['minute']), curves

    @staticmethod
    def curve(figures):
        """Return a curve that ends with these figures, 4 bytes each."""
        import array
        curve = array.array('f', [math.nan] * KEPT_MINUTES)
        curve.extend(figures)
        return curve[-KEPT_MINUTES:]

    def add(self, minute, figures: dict[str, float]):
        """Add the figures of a minute; minutes that were left out before it are gaps."""
        passed = minute - self.minute
        if passed < 0:                          # the clock was set back
            passed = 1
        gap = [math.nan] * min(passed, KEPT_MINUTES)
        curves = {}
        for name in {*self.curves, *figures}:
            curve = self.curve([*self.curves.get(name, ()), *gap])
            curve[-1] = plausible(figures.get(name))
            # That of a disk that is no longer there goes.
            if not all(map(math.isnan, curve)):
                curves[name] = curve
        self.minute, self.curves = minute, curves

    def averages(self, name, minutes, step) -> list[float]:
        """Return the last minutes of a curve, `step` of them as one, which is their average."""
        curve = self.curves.get(name, self.curve(()))[-minutes:]
        found = []
        for start in range(0, minutes, step):
            known = [value for value in curve[start:start + step] if not math.isnan(value)]
            found.append(math.nan)
            if known:
                found[-1] = sum(known) / len(known)
        return found

    def save(self):
        """Keep it for the next start."""
        curves = {name: curve.tolist() for name, curve in self.curves.items()}
        replace_file(self.path, json.dumps({'minute': self.minute, 'curves': curves}))


class Figures:
    """What an rTorrent tells, asked for at most every FRESH seconds; nothing while it is away."""
    COLUMNS = ('d.message=', 't.multicall=,t.url=,t.is_enabled=')

    def __init__(self, engine):
        self.engine = engine
        self.lock = threading.Lock()
        self.asked = -FRESH
        self.numbers = {}                       # command or `view NAME` -> answer
        self.folder = ''                        # where it puts data
        self.count_trackers([])

    def renew(self):
        """Ask, if what was told is old; where another thread is asking, do not wait for long."""
        engine = self.engine
        if not engine.methods or engine.is_away:
            # A hung one would cost a timeout each time; Page.measure() tries it every minute.
            self.numbers = {}
        elif self.lock.acquire(timeout=1):
            try:
                if elapsed_time() - self.asked >= FRESH:
                    self.asked = elapsed_time()
                    self.ask()
            finally:
                self.lock.release()

    def ask(self):
        """Ask for all that anybody wants to know, in one round trip."""
        engine = self.engine
        calls = {
            'folder': ('directory.default', ''),
            'trackers': ('d.multicall2', '', 'main', *self.COLUMNS)}
        for command in engine.methods.intersection(METRICS):
            calls[command] = (command, '')
        for view in [*VIEWS, *sorted(engine.views.difference(VIEWS))]:
            calls[f'view {view}'] = ('view.size', '', view)
        told = {}
        with contextlib.suppress(RpcError):
            told = dict(zip(calls, engine.in_parts(calls.values(), engine.by_xml)))
        self.numbers = {name: answer for name, answer in told.items() if plausible(answer) >= 0}
        self.folder = typed(told.get('folder'), self.folder)
        self.count_trackers(typed(told.get('trackers'), []))

    def count_trackers(self, rows):
        """Count the torrents of each tracker, and those of them with a message."""
        torrents, with_message = [], []         # the alias of the tracker of each
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            for message, trackers in rows:
                alias = alias_of(trackers, self.engine.aliases) or ''
                torrents.append(alias)
                if message:
                    with_message.append(alias)
        self.trackers = collections.Counter(torrents)
        self.messages = collections.Counter(with_message)

    def views(self) -> dict[str, int]:
        """Return the sizes of views, those first that every rTorrent has."""
        return {name[5:]: size for name, size in self.numbers.items() if name.startswith('view ')}


def markup(text):
    """Return text of anybody as HTML that shows it, without secrets and not endless."""
    import html
    shown = one_line(scrubbed(str(text)[:10 * MOST_SHOWN]))
    if len(shown) > MOST_SHOWN:
        shown = shown[:MOST_SHOWN] + '...'
    return html.escape(shown)


class LogTail(logging.Handler):
    """Keeps the last lines of the log, as HTML."""

    def __init__(self):
        super().__init__()
        self.lines: collections.deque = collections.deque(maxlen=LOG_SHOWN)
        root = logging.getLogger()
        self.setFormatter(root.handlers[0].formatter)
        root.addHandler(self)

    def emit(self, record):
        css_class = ''
        if record.levelno >= logging.WARNING:
            css_class = 'bad'
        # A job that logs nonsense is not to fail by it.
        with contextlib.suppress(Exception):
            for line in self.format(record).split('\n'):
                self.lines.append(f'<span class="{css_class}">{markup(line)}</span>')


def html_section(title, inner, css_class=''):
    """Return a part of the page."""
    return f'<section><h2 class="{css_class}">{markup(title)}</h2>{inner}</section>'


def html_list(css_class, texts):
    """Return an HTML list of what is HTML already."""
    inner = ''.join(f'<li>{text}</li>\n' for text in texts)
    return f'<ul class="{css_class}">{inner}</ul>'


def path_data(values, top):
    """Return the path of a curve in a plot of 100 by 100; nan breaks it.

    >>> path_data([0.0, 5.0, math.nan, 10.0], 10)
    'M0.0 100.0h0L33.3 50.0M100.0 0.0h0'
    """
    path, step = '', 'M'
    for at, value in enumerate(values):
        if math.isnan(value):
            step = 'M'
            continue
        path += f'{step}{100 * at / (len(values) - 1):.1f} {100 - 100 * value / top:.1f}'
        # A lone point is a dot by this.
        if step == 'M':
            path += 'h0'
        step = 'L'
    return path


def round_above(values):
    """Return the power of two that no value is above, at least a KiB; nan is no value."""
    top = 1024.0
    for value in values:
        while value > top:
            top *= 2
    return top


class Samples:
    """Figures in Prometheus' text format.

    >>> samples = Samples()
    >>> samples.add('a_total', 'All.', 1, b='c"')
    >>> print(samples.text(), end='')
    # HELP a_total All.
    # TYPE a_total counter
    a_total{b="c\\""} 1
    """

    def __init__(self):
        self.families = {}

    def add(self, name, about, value: float | None, **labels):
        """Add a sample of a metric, unless its value is None."""
        if value is None:
            return
        kind = 'gauge'
        if name.endswith('_total'):
            kind = 'counter'
        family = self.families.setdefault(name, [f'# HELP {name} {about}',
                                                 f'# TYPE {name} {kind}'])
        pairs = []
        for label, text in labels.items():
            escaped = one_line(text).replace('\\', r'\\').replace('"', r'\"')
            pairs.append(f'{label}="{escaped}"')
        family.append(f"{name}{{{','.join(pairs)}}} {value}")

    def text(self):
        """Return all samples, those of a metric together."""
        return '\n'.join(itertools.chain(*self.families.values(), ['']))

    def add_job(self, job):
        """Add what --status tells of a job."""
        for key, name, about in JOB_METRICS:
            self.add(name, about, job[key], job=job['name'])
        self.add('torque_job_failing', 'Has the last run failed?', int(bool(job['last_error'])),
                 job=job['name'])

    def add_engine(self, where, figures):
        """Add what an rTorrent tells."""
        engine, numbers = figures.engine, figures.numbers
        add = functools.partial(self.add, rtorrent=where)
        add('rtorrent_up', 'Does rTorrent answer?', int(bool(numbers)))
        if not numbers:
            return
        client, _, library = engine.version.partition('/')
        add('rtorrent_info', 'Versions of rTorrent and its library.', 1, client=client,
            library=library)
        add('rtorrent_start_time_seconds', 'When rTorrent was started.', engine.startup or None)
        for command, name in METRICS.items():
            add(f'rtorrent_{name}', f'What rTorrent answers to {command}.', numbers.get(command))
        for view, size in figures.views().items():
            add('rtorrent_view_torrents', 'Size of a view.', size, view=view)
        for alias, count in figures.trackers.most_common(MOST_TRACKERS):
            add('rtorrent_tracker_torrents', 'Torrents whose first tracker it is.', count,
                tracker=alias)
            add('rtorrent_tracker_message_torrents', 'Those with a message.',
                figures.messages[alias], tracker=alias)


ADDRESS = re.compile(r'[\d.]+|\[[\da-f:.]+\]')
PORT = re.compile(r':\d+\Z')


class Page:
    """All that is to be seen of a daemon."""
    SAVE_EVERY = 15                             # minutes

    def __init__(self, daemon):
        self.daemon = daemon
        self.config = config = daemon.config
        self.password = str(config.torque['httpd.password'] or '')
        self.host = config.torque['httpd.host']
        self.names = {'localhost', self.host.lower(), socket.gethostname().lower()}
        self.engines = {engine.address.where: Figures(engine)
                        for engine in config.engines.values()}
        self.history = History(os.path.join(config.state_dir, HISTORY))
        self.folders = {}       # rTorrent -> where it puts data
        self.log = logging.getLogger('torque.page')
        self.tail = LogTail()
        self.repeats = Repeats()
        self.busy = set()       # requests that are being read or answered

    # What is measured.

    def watch(self):
        """Take a point of the history each minute; a thread."""
        while True:
            try:
                self.measure(time.time())
            except Exception as error:          # a full disk, say
                if self.repeats.deserve_line(kind_of_error(error)):
                    self.log.warning('%s', error_text(error))
            time.sleep(60 - time.time() % 60)

    def measure(self, now):
        """Take a point of the history."""
        rates: dict[str, Any] = {}
        for where, figures in self.engines.items():
            with contextlib.suppress(RpcError):
                figures.engine.reach()
            figures.renew()
            for way in ('up', 'down'):
                rates[f'{way} {where}'] = figures.numbers.get(f'throttle.global_{way}.rate')
            if figures.folder and not why_unseen(figures.engine):
                folder = os.path.expanduser(figures.folder)
                self.folders[where] = os.path.join(figures.engine.cwd, folder)
        free = {f'free {path}': disk['disk_free'] for path, disk in self.disks().items()}
        minute = int(now // 60)
        self.history.add(minute, {**rates, **free})
        if minute % self.SAVE_EVERY == 0:
            self.history.save()

    def disks(self) -> dict[str, dict]:
        """Return the figures of each disk, by a path on it."""
        measured = [planned.config.disk_path for planned in self.config.jobs
                    if planned.make is InfluxDB and planned.config.disk_path]
        # No such job is active
        measured = measured or [self.config.influxdb.disk_path or '~']
        paths = os.pathsep.join(measured).split(os.pathsep)
        found, devices = {}, set()
        for path in [*self.folders.values(), *map(os.path.expanduser, paths)]:
            device = disk_of(path)[0]
            if device not in devices:
                # A folder that is not there yet must not hide the disk it would be on
                with contextlib.suppress(LoggableError):
                    found[path] = disk_figures(path)
                    devices.add(device)
        return found

    # What is answered.

    def is_served(self, host):
        """Tell whether a request may be for this host, as its header names it.

        For other names a page of somebody else may make a browser take this for its server.
        """
        name = PORT.sub('', host).lower()
        return name in self.names or bool(ADDRESS.fullmatch(name))

    def respond(self, path, headers):
        """Return status, content type and text of the answer to a request."""
        import hmac
        if not self.is_served(headers.get('Host', '')):
            return 421, 'text/plain', 'not served under this name: use localhost or an address\n'
        if self.password:
            login = headers.get('Authorization', '').partition('Basic ')[2]
            given = b''
            with contextlib.suppress(ValueError):
                given = binascii.a2b_base64(login).partition(b':')[2]
            if not hmac.compare_digest(given, self.password.encode()):
                return 401, 'text/plain', 'a password is needed\n'
        pages = {
            '/': ('text/html', self.html),
            '/torque.css': ('text/css', CSS.strip),
            '/torque.js': ('text/javascript', JAVASCRIPT.strip),
            '/metrics': ('text/plain; version=0.0.4', self.metrics),
            '/status.json': ('application/json', self.json)}
        kind, make = pages.get(path.partition('?')[0], ('', None))
        if make is None:
            return 404, 'text/plain', f"there are {' '.join(pages)}\n"
        return 200, kind, make()

    def json(self):
        """Return what --status --json prints."""
        return json.dumps(self.daemon.status(), indent=1)

    def metrics(self):
        """Return all figures for Prometheus."""
        status, samples = self.daemon.status(), Samples()
        samples.add('torque_info', 'Version of torque.', 1, version=VERSION)
        samples.add('torque_start_time_seconds', 'When torque was started.', status['started'])
        for job in status['jobs']:
            samples.add_job(job)
        for path, disk in self.disks().items():
            for name, value in disk.items():
                samples.add(f'torque_{name}_bytes', 'Of the disk of a path.', value, path=path)
        for where, figures in self.engines.items():
            figures.renew()
            samples.add_engine(where, figures)
        return samples.text()

    def html(self):
        """Return the page."""
        for figures in self.engines.values():
            figures.renew()
        status = self.daemon.status()
        lines = '\n'.join(list(self.tail.lines))
        return PAGE % '\n'.join([
            self.header(status),
            *map(self.engine_part, status['rtorrent']),
            *[self.disk_part(path, **disk) for path, disk in self.disks().items()],
            self.jobs_part(status['jobs']),
            *self.outlooks(),
            html_section('Log', f'<pre>{lines}</pre>')])

    @staticmethod
    def header(status):
        """Return the head of the page, which names the jobs that fail."""
        failing = [job['name'] for job in status['jobs'] if job['last_error']]
        bad = ''
        if failing:
            bad = f"<p class=\"bad\">failing: {markup(', '.join(failing))}</p>"
        return (f"<header><h1>torque {VERSION}</h1><p class=\"dim\">up "
                f"{show_duration(status['uptime'])}, pid {status['pid']}, "
                f"{markup(status['config'])}</p>{bad}</header>")

    def engine_part(self, status):
        """Return what is shown of an rTorrent."""
        where = status['address']
        figures = self.engines[where]
        name, _, line = engine_line(**status).partition(' at ')
        css_class = ''
        if status['away_for'] is not None:
            css_class = 'bad'
        if figures.engine.startup and figures.numbers:
            line += f', up {show_duration(time.time() - figures.engine.startup)}'
        views = [f'{markup(view)} <span>{size}</span>' for view, size in figures.views().items()]
        return html_section(name, (
            f'<p class="{css_class or "dim"}">{markup(line)}</p>'
            f'<div class="row">{self.rates(figures.numbers)}</div>'
            f'{self.plots(where, ("up", "down"), "/s")}{html_list("views", views)}'), css_class)

    @staticmethod
    def rates(numbers):
        """Return what is shown of the traffic of an rTorrent; nothing while it is away."""
        rates = ''
        for way in ('up', 'down'):
            rate, limit, total = (numbers.get(f'throttle.global_{way}.{key}', 0)
                                  for key in ('rate', 'max_rate', 'total'))
            shown = f'{show_size(total)} in all'
            if limit:
                shown = f'of {show_size(limit)}/s, {shown}'
            if numbers:
                rates += (f'<p><b class="{way}">{way} {show_size(rate)}/s</b>'
                          f'<span class="dim">{shown}</span></p>')
        return rates

    def disk_part(self, path, disk_total, disk_free):
        """Return what is shown of a disk."""
        return html_section(f'Disk of {path}', (
            f'<div class="row"><p><b class="free">{show_size(disk_free)} free</b>'
            f'<span class="dim">of {show_size(disk_total)}</span></p></div>'
            f'{self.plots(path, ("free",), "")}'))

    def plots(self, of, names, unit):
        """Return plots of the last hour and day of curves, whose names are classes of CSS."""
        parts = []
        for title, minutes, step in PLOTS:
            paths, scales, times = '', '', ''
            for name in names:
                values = self.history.averages(f'{name} {of}', minutes, step)
                top = round_above(values)
                paths += f'<path class="{name}" d="{path_data(values, top)}"/>'
                scales += f' <span class="{name}">{name} &le; {show_size(top)}{unit}</span>'
            if 'M' not in paths:
                scales = 'no figures yet'
            for quarter in (4, 3, 2, 1, 0):
                moment = time.localtime(60 * (self.history.minute - quarter * minutes // 4))
                times += f"<span>{time.strftime('%H:%M', moment)}</span>"
            parts.append(PLOT.format(title=title, paths=paths, scales=scales, times=times))
        return f'<div class="plots">{"".join(parts)}</div>'

    @staticmethod
    def jobs_part(jobs):
        """Return the table of jobs as --status has it; what has failed stands out."""
        *keys, last = COLUMNS
        heads = ''.join(f'<th>{COLUMNS[key].capitalize()}</th>' for key in keys)
        rows = [f'<tr>{heads}</tr>']
        for job in jobs:
            css_class = ''
            if job[last] or job['state'] == 'overdue':
                css_class = 'bad'
            cells = ''.join(f'<td>{markup(status_cell(key, job[key]))}</td>' for key in keys)
            rows.append(f'<tr class="{css_class}">{cells}</tr>')
            if job[last]:
                rows.append(f'<tr class="bad error"><td colspan="{len(keys)}">'
                            f'{markup(job[last])}</td></tr>')
        return html_section('Jobs', '<table>' + '\n'.join(rows) + '</table>')

    def outlooks(self) -> list[str]:
        """Return what each job is going to do, or leaves alone."""
        parts = []
        for name, job in sorted(self.daemon.jobs.items()):
            lines = []
            # Those of other people need not be one.
            if isinstance(job, Job):
                lines = job.outlook()
            if lines:
                parts.append(html_section(f'{name}: what comes next',
                                          html_list('next', map(markup, lines))))
        return parts


def request_head(sock) -> bytes:
    """Return the head of a request, nothing where it is too long or does not come in time."""
    end, head = elapsed_time() + HEAD_TIME, b''
    while b'\r\n\r\n' not in head:
        sock.settimeout(max(end - elapsed_time(), 0.001))
        piece = b''
        with contextlib.suppress(OSError):
            piece = sock.recv(HEAD_LIMIT)
        head += piece
        if not piece or len(head) >= HEAD_LIMIT:
            return b''
    # That is for the answer.
    sock.settimeout(HEAD_TIME)
    return head


def make_handler(page):
    """Return the class that answers requests for a page."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        server_version, sys_version = 'torque', ''
        error_message_format, error_content_type = '%(code)d %(message)s\n', 'text/plain'

        def setup(self):
            super().setup()
            page.busy.add(self)
            self.rfile.close()
            self.rfile = io.BytesIO(request_head(self.connection))

        def finish(self):
            page.busy.discard(self)
            super().finish()

        def do_GET(self):
            status, kind, text = page.respond(self.path, self.headers)
            body = text.encode('utf-8', 'replace')
            self.send_response(status)
            for line in HEADERS.splitlines():
                self.send_header(*line.split(': ', 1))
            if status == 401:
                self.send_header('WWW-Authenticate', 'Basic realm="torque"')
            self.send_header('Content-Type', f'{kind}; charset=utf-8')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            if self.command != 'HEAD':
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format, *args):
            page.log.debug('%s %s', self.address_string(), quoted(format % args))

    return Handler


def web_server(page, port):
    """Return a server for a page; OSError where it cannot listen."""
    import socketserver

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True
        request_queue_size = 128
        if ':' in page.host:
            address_family = socket.AF_INET6

        def get_request(self):
            try:
                return super().get_request()
            except OSError:
                # There can be no more open files.
                time.sleep(0.5)
                raise

        def verify_request(self, request, client_address):
            return len(page.busy) < MOST_REQUESTS

        def handle_error(self, request, client_address):
            error = sys.exc_info()[1]
            if not isinstance(error, OSError) and page.repeats.deserve_line(kind_of_error(error)):
                page.log.exception('a request failed')

    return Server((page.host, port), make_handler(page))


def serve_page(daemon):
    """Serve the page of a daemon where that is switched on."""
    torque = daemon.config.torque
    if not torque['httpd.active']:
        return
    page = Page(daemon)
    host, port = page.host, torque['httpd.port']
    try:
        server = web_server(page, port)
        in_thread(page.watch)
        in_thread(server.serve_forever, 3600)
    # The port is taken, the host means nothing, or there can be no more threads.
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, 'strerror', error)
        page.log.warning('no page: %s port %s: %s', host, port, why)
        return
    # A child that a job forks has no part in it.
    os.register_at_fork(after_in_child=server.socket.close)
    daemon.at_end.append(page.history.save)
    if ':' in host:
        host = f'[{host}]'
    page.log.info('the page is at http://%s:%d/', host, server.server_address[1])


DEMO_INI = '''\
[TORQUE]
scgi_url = scgi:///demo
state_dir = .
httpd.active = yes
httpd.port = 0
job.connstats.schedule = every 20s
job.queue.active = yes
job.queue.schedule = every 10s
job.queue.downloading_max = 3
job.tidy.handler = torque:Action
job.tidy.schedule = every 30s
job.tidy.matcher = ratio>1.5
job.tidy.sort = -ratio
job.tidy.action = delete
job.tidy.limit = 1
job.tidy.dry_run = yes
job.notify.handler = torque:ItemCommand
job.notify.schedule = every 1m
job.notify.matcher = is_complete=yes completed<10i
job.notify.args = echo "Done: {{name}}"
job.notify.dry_run = yes
job.fails_on_purpose.handler = torque:Command
job.fails_on_purpose.schedule = every 15m
job.fails_on_purpose.args = ls backup-disk
'''
# Name, MiB, KiB/s of its downloads and of its uploads; the first are there since long
DEMO_ITEMS = '''\
debian-12.8.0-amd64-DVD-1.iso|3788|9000|900
archlinux-2026.11.01-x86_64.iso|1150|9000|350
Night.of.the.Living.Dead.1968.mkv|2210|9000|120
librivox-moby-dick.flac|890|9000|60
ubuntu-26.10-desktop-amd64.iso|5900|3500|80
Big.Buck.Bunny.2008.mkv|1680|2200|40
fedora-workstation-44.iso|2300|1500|30
Sintel.2010.mkv|1240|2000|20
NetBSD-11.0-amd64.iso|620|3000|10
wikipedia-en-nopic.zim|48000|2500|5'''
# View, and the column that is not 0 there; others have all.
DEMO_VIEWS = dict(line.split() for line in '''\
started state
active state
complete complete
seeding complete
stopped stopped
incomplete left_bytes
leeching left_bytes
messages message'''.splitlines())


class StandIn(Engine):
    """Answers what built-in jobs ask of an rTorrent, with a few torrents."""

    def __init__(self, *args):
        super().__init__(*args)
        self.began = time.time()
        # Hash -> Unix seconds; the first four are complete.
        self.started = {f'{number:040X}': self.began - 200000 / number ** 4
                        for number in range(1, 7)}
        self.told = {
            **dict.fromkeys([*METRICS, *ABOUT, 'print'], 0),
            'session.name': 'demo',
            'session.path': '',
            'system.client_version': 'of --demo',
            'system.library_version': VERSION,
            'system.listMethods': [*METRICS],
            'startup_time': int(self.began) - 300000,
            'view.list': VIEWS,
            'throttle.global_up.max_rate': 2 << 20}

    def by_xml(self, calls):
        return [self.answer(*call) for call in calls]

    def answer(self, method, target='', view='', *cells):
        """Return the answer to a call, or the fault."""
        now = time.time()
        if method == 'd.start':
            self.started[target] = now
            return 0
        rows = [self.row(number, line, now)
                for number, line in enumerate(DEMO_ITEMS.splitlines(), 1)]
        column = method.replace('throttle.global_', '')
        if column in rows[0]:
            return sum(row[column] for row in rows)
        shown = [row for row in rows if row[DEMO_VIEWS.get(view, 'hash')]]
        if method == 'view.size':
            return len(shown)
        if method == 'd.multicall2':
            columns = [cell[2:].partition('=')[0] for cell in cells]
            return [[row[column] for column in columns] for row in shown]
        return self.told.get(method, RpcError(f'there is no {method}', MISSING[0]))

    def row(self, number, line, now) -> dict[str, Any]:
        """Return what d. commands answer for an item; 0 for what is not listed."""
        name, *numbers = line.split('|')
        size, down, up = (int(text) << 10 for text in numbers)
        info_hash, size = f'{number:040X}', size << 10
        start = self.started.get(info_hash, now)
        end = start + size / down
        state = int(info_hash in self.started)
        complete = int(now >= end)
        done = min(size, int(down * (now - start)))
        uploaded = int(up * (now - start))
        swing = state * (1 + 0.3 * math.sin(now / (20 + number) + number))
        return collections.defaultdict(int, {
            **dict.fromkeys(('message', 'custom', 'custom1', 'base_path', 'directory'), ''),
            **dict.fromkeys(('state', 'is_active', 'is_open'), state),
            'hash': info_hash,
            'name': name,
            'size_bytes': size,
            'completed_bytes': done,
            'left_bytes': size - done,
            'complete': complete,
            'stopped': 1 - state,
            'priority': 2,
            'down.rate': (1 - complete) * int(swing * down),
            'up.rate': int(swing * up),
            'up.total': uploaded,
            'down.total': done,
            'ratio': 1000 * uploaded // size,
            'timestamp.started': state * int(start),
            'timestamp.finished': complete * int(end),
            't.multicall': [[f'http://tracker{number % 2}.example.org/', 1]]})


def fill_history(folder):
    """Write a day that might have been, with a gap, for the rTorrent of --demo."""
    home = os.path.expanduser('~')
    names = ('up scgi:///demo', 'down scgi:///demo', f'free {home}')
    # That of a user who only runs services may not be there
    free = disk_figures(existing(os.path.abspath(home)))['disk_free']
    points = []
    for minute in range(KEPT_MINUTES, 0, -1):
        hour = minute / 60
        up = 1.3 + math.sin(hour / 4) / 2 + math.sin(7 * hour) / 6
        down = 6 * math.cos(hour) + 2 * math.cos(9 * hour)
        points.append((up * 2 ** 20, max(0, down) * 2 ** 20, free * (1 + hour / 150)))
    points[880:940] = [(math.nan,) * 3] * 60
    kept = {'minute': int(time.time() // 60) - 1, 'curves': dict(zip(names, zip(*points)))}
    replace_file(os.path.join(folder, HISTORY), json.dumps(kept))


# Title, unit of Grafana, what InfluxDB is asked, what Prometheus is asked, name of a curve there
PANELS = '''\
Rates | Bps | mean(up_rate) AS up, mean(down_rate) AS down FROM rtorrent \
| {__name__=~"rtorrent_(up|down)load_bytes_per_second"} | {{__name__}}
Traffic | bytes | max(up_total) AS up, max(down_total) AS down FROM rtorrent \
| {__name__=~"rtorrent_(up|down)load_bytes_total"} | {{__name__}}
Torrents | short | mean(main) AS main, mean(active) AS active, mean(seeding) AS seeding, \
mean(leeching) AS leeching FROM rtorrent_views \
| rtorrent_view_torrents{view=~"main|active|seeding|leeching"} | {{view}}
Sockets and files | short | mean(open_sockets) AS sockets, mean(open_files) AS files FROM rtorrent \
| {__name__=~"rtorrent_open_(sockets|files)"} | {{__name__}}
Free space | bytes | mean(disk_free) AS free FROM host | torque_disk_free_bytes | {{path}}
Uptime | s | max(uptime) AS uptime FROM rtorrent | time() - rtorrent_start_time_seconds | uptime'''


def dashboard(kind) -> dict:
    """Return a dashboard of Grafana, whose source of data is influxdb or prometheus."""
    panels = []
    for number, line in enumerate(PANELS.splitlines()):
        title, unit, influxql, promql, name = line.split(' | ')
        target: dict[str, Any] = {'refId': 'A', 'expr': promql, 'legendFormat': name}
        if kind == 'influxdb':
            query = f'SELECT {influxql} WHERE $timeFilter GROUP BY time($__interval) fill(none)'
            target = {'refId': 'A', 'query': query, 'rawQuery': True,
                      'resultFormat': 'time_series', 'alias': '$col'}
        panels.append({
            'id': number + 1,
            'type': 'timeseries',
            'title': title,
            'datasource': {'type': kind, 'uid': '${source}'},
            'gridPos': {'x': number % 2 * 12, 'y': number // 2 * 8, 'w': 12, 'h': 8},
            'fieldConfig': {'defaults': {'unit': unit}, 'overrides': []},
            'targets': [target]})
    return {
        'title': 'rTorrent',
        'tags': ['torque'],
        'schemaVersion': 36,
        'time': {'from': 'now-24h', 'to': 'now'},
        'templating': {'list': [{'name': 'source', 'type': 'datasource', 'query': kind}]},
        'panels': panels}


# --- Command line ----------------------------------------------------------------------------
# Arguments enter, an exit status leaves. Here alone are the log's form and the end of the
# process; all of it runs in the main thread.

class LogFormat(logging.Formatter):
    """A line a record: control characters are escaped, tracebacks follow below, indented."""
    warnings = 0                        # lines of that level or above

    def __init__(self, with_time):
        form = '%(levelname)s %(job)s: %(text)s'
        if with_time:
            form = '%(asctime)s ' + form
        super().__init__(form, '%Y-%m-%d %H:%M:%S')

    def format(self, record):
        record.job = one_line(re.sub(r'^torque\.', '', record.name))
        record.text = scrubbed(one_line(record.getMessage()))
        if record.levelno >= logging.WARNING:
            self.warnings += 1
        return super().format(record)

    def formatException(self, ei):
        lines = super().formatException(ei).split('\n')
        # A text in it may look like a record.
        return scrubbed('\n'.join(f'    {one_line(line)}' for line in lines))


def stderr_is_journal():
    """Tell whether systemd's journal reads stderr: it names device and inode of the stream."""
    try:
        stream = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get('JOURNAL_STREAM') == f'{stream.st_dev}:{stream.st_ino}'


def log_file_handler(path):
    """Return what writes the log to a private file: 10 MiB, and five older ones."""
    from logging.handlers import RotatingFileHandler

    class LogFile(RotatingFileHandler):
        def _open(self):
            return open(self.baseFilename, 'a', encoding='utf-8',
                        opener=functools.partial(os.open, mode=0o600))

        def doRollover(self):
            """Go on in the same file where its folder cannot be written."""
            with contextlib.suppress(OSError):
                super().doRollover()

    try:
        return LogFile(os.path.expanduser(path), maxBytes=10 << 20, backupCount=5)
    except OSError as error:
        raise UserError(f'log file {path}: {error.strerror}') from None


def set_up_log(level, log_file: str | None):
    """Send the log to stderr, or to a file; systemd's journal adds the time itself."""
    # A closed stderr must not end anything.
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    if log_file:
        handler = log_file_handler(log_file)
    handler.setFormatter(LogFormat(bool(log_file) or not stderr_is_journal()))
    # What modules of jobs, and libraries, log by other names goes there as well.
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def run_once(config) -> int:
    """Run the one planned job now, in the foreground."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    planned, = config.jobs
    job = make_jobs(config.jobs)[planned.name]

    def run() -> None:
        try:
            job.run()
        except KeyboardInterrupt:
            raise LoggableError('interrupted') from None
    task = make_task(planned, run)
    try:
        task.attempt()
    finally:
        clean_up(planned.name, job)
    if task.failures:
        return EXIT_FAILED
    return EXIT_OK


def next_runs(schedule):
    """Return the next three due times of a schedule, and the time zone that they are in."""
    due = time.time()
    if isinstance(schedule, Interval):
        # Intervals count from the start of torque, which would be now.
        schedule.start = due
        due -= 0.001
    dates = []
    for _ in range(3):
        due = schedule.next(due)
        if due is None:
            break
        dates.append(datetime.fromtimestamp(due, schedule.zone).strftime('%Y-%m-%d %H:%M:%S'))
    zone = schedule.zone or time.strftime('%Z')
    return f"{', '.join(dates)} {zone}"


def check_engine(engine):
    """Print whether an rTorrent answers."""
    try:
        engine.reach()
        print(f'{engine.address.where}: rTorrent {one_line(engine.version)} answers')
    except RpcError as error:
        if not error.told:
            logging.getLogger('torque.engine').warning('%s', error)


def check(config, pid_file) -> int:
    """Print what would run and when, and whether rTorrent answers."""
    rows = [('JOB', 'HANDLER', 'SCHEDULE', 'NEXT RUNS')]
    jobs = make_jobs(config.jobs)
    for planned in config.jobs:
        rows.append((planned.name, planned.config.handler, planned.config.schedule,
                     next_runs(planned.schedule)))
    print_table(rows)
    for engine in config.engines.values():
        check_engine(engine)
    for name, job in jobs.items():
        if hasattr(job, 'check'):
            for text in job.check():
                logging.getLogger('torque.' + name).warning('%s', text)
    warn_of_risks(config, jobs.values())
    require_place(config.state_dir)
    require_place(os.path.dirname(pid_file.path))
    told = f'{config.path}: no mistakes'
    log_format: Any = logging.getLogger().handlers[0].formatter
    if log_format.warnings:
        told += f'; warnings: {log_format.warnings}'
    if any(engine.is_away for engine in config.engines.values()):
        told += '; rTorrent is away'
    print(told)
    return EXIT_OK


def explain(config, path) -> int:
    """Print what every job that can tell would do with a metafile."""
    lines = []
    for name, job in make_jobs(config.jobs).items():
        if hasattr(job, 'explain'):
            lines += [one_line(f'{name}: {line}') for line in job.explain(path)]
    text = '\n'.join(lines)
    print(text or 'no TreeWatch job is active')
    if not text or ' is not loaded: ' in text:
        return EXIT_FAILED
    return EXIT_OK


def list_jobs() -> int:
    """Print the built-in jobs and their options."""
    tables = {}
    for handler, job in BUILT_IN.items():
        summary = (job.__doc__ or '').splitlines()[0]
        tables[f'{handler}\n    {summary}'] = job.options
    tables['any job'] = CORE_OPTIONS
    tables['[TORQUE]'] = TORQUE_OPTIONS
    for title, options in tables.items():
        print(title)
        for option in options:
            line = f'    {option.name:<23} {option.kind:<7} {option.help}'
            if option.alias:
                line += f' (or {option.alias})'
            if option.default != '':
                line += f' [{option.default}]'
            print(line)
        print()
    return EXIT_OK


def find_pid_file(arguments, path):
    """Return the pid file that goes with a configuration."""
    options = Settings()
    with contextlib.suppress(UserError):
        # The file may be broken or gone by now.
        ini = read_files(path, arguments.define)
        options = checked(TORQUE_OPTIONS, ini.torque, ini)
    name = arguments.pid_file or beside(path, options.pid_file)
    if not name:
        name = os.path.join(state_folder(path, options.state_dir), 'torque.pid')
    return PidFile(os.path.abspath(name))


def print_error(text):
    """Print what went wrong; names and answers in it may hold anything."""
    for line in text.split('\n'):
        print(one_line(line), file=sys.stderr)


def reload(pid_file):
    """Have the daemon reload; return the exit status, when it has."""
    before = pid_file.ask()
    pid_file.signal(signal.SIGHUP)
    end = elapsed_time() + CHECK_TIMEOUT + before['grace'] + 20
    while elapsed_time() < end:
        time.sleep(0.02)
        if not pid_file.is_locked():
            raise LoggableError('the daemon has ended; its log says why')
        with contextlib.suppress(LoggableError):
            # While it starts over it does not answer.
            now = pid_file.ask()
            if now['started'] != before['started'] and not now['starting']:
                print('reloaded')
                return EXIT_OK
            if now['refusals'] > before['refusals']:
                print_error('\n'.join(now['mistakes']))
                return EXIT_CONFIG
    raise LoggableError('the daemon has not reloaded in time; its log may say why')


def control(arguments, path):
    """Speak with a running daemon; return the exit status."""
    pid_file = find_pid_file(arguments, path)
    if not pid_file.is_locked():
        if not arguments.pid_file:
            # This raises where the file cannot be read, and might name another pid file.
            read_files(path, ())
        told = one_line(f'torque is not running with {path}: {pid_file.path} is not locked')
        if arguments.json:
            told = '{}'
        print(told)
        return EXIT_NOT_RUNNING
    if arguments.stop:
        pid_file.stop()
        return EXIT_OK
    if arguments.reload:
        return reload(pid_file)
    status = pid_file.ask()
    bad = [job for job in status['jobs'] if job['last_error'] or job['state'] == 'overdue']
    if arguments.json:
        print(json.dumps(status, indent=1))
    elif status['starting']:
        print('torque is starting')
    else:
        print_status(status)
    if bad or status['starting']:
        return EXIT_FAILED
    return EXIT_OK


def load(arguments, path):
    """Load the configuration, and log what is noteworthy in it even when it is refused."""
    log = logging.getLogger('torque.config')
    config_ini.remarks = []
    try:
        config_ini.load(path, arguments.define, arguments.dry_run, arguments.run_once)
    finally:
        for level, text in dict.fromkeys(config_ini.remarks):
            log.log(level, '%s', text)


def background_log(arguments, path):
    """Return the path of the log of a daemon in the background."""
    log_file = arguments.log_file or beside(path, config_ini.torque.log_file)
    if not log_file:
        log_file = os.path.join(config_ini.state_dir, 'torque.log')
        with contextlib.suppress(OSError):
            # What is wrong with the folder, opening the log will say.
            os.makedirs(config_ini.state_dir, mode=0o700, exist_ok=True)
    return log_file


def check_start(arguments, path, pid_file):
    """Raise UserError for what a start would fail over, as far as is known without other jobs."""
    require_place(config_ini.state_dir)
    require_place(os.path.dirname(pid_file.path))
    if arguments.daemon:
        log_file_handler(background_log(arguments, path)).close()
    # Of the jobs of others nobody knows what being made does.
    make_jobs([planned for planned in config_ini.jobs if planned.make in BUILT_IN.values()])


def check_files(arguments, path) -> int:
    """Check what a reload would read, and make built-in jobs of it; for the daemon."""
    load(arguments, path)
    check_start(arguments, path, find_pid_file(arguments, path))
    return EXIT_OK


def log_level(arguments):
    """Return from which level on the log is shown."""
    if arguments.check_files:
        # What is noteworthy the new daemon will say.
        return logging.CRITICAL
    if arguments.debug:
        return TRACE
    if arguments.verbose:
        return logging.DEBUG
    if arguments.quiet:
        return logging.WARNING
    return logging.INFO


def start_daemon(arguments, path, pid_file, reloaded):
    """Return a daemon whose jobs are made, and that logs where it is to log."""
    load(arguments, path)
    if not reloaded:
        require_place(config_ini.state_dir)
        if arguments.restart:
            # The other is ended only where nothing is in the way of the next one.
            check_start(arguments, path, pid_file)
            pid_file.stop()
    if not pid_file.keep():
        pid = pid_file.read()[1]
        raise AlreadyRunning(f'torque is running already, with pid {pid} ({pid_file.path})')
    if arguments.daemon:
        set_up_log(log_level(arguments), background_log(arguments, path))
    daemon = Daemon(config_ini, pid_file)
    daemon.begin()
    if arguments.daemon and not arguments.cron:
        log_file = daemon.status()['log_file']
        with contextlib.suppress(OSError):
            print(one_line(f'torque runs in the background, pid {daemon.pid}, log {log_file}'),
                  flush=True)
    return daemon


def run_daemon(arguments, path) -> int:
    """Start, in the background when that is asked for, and run until a signal comes."""
    pid_file = find_pid_file(arguments, path)
    verb = 'started'
    writer = None
    if pid_file.inherit():
        verb = 'reloaded'
    elif arguments.cron and pid_file.is_locked():
        return EXIT_RUNNING
    elif arguments.daemon:
        writer = detach()
    status = EXIT_FAILED
    try:
        daemon = start_daemon(arguments, path, pid_file, verb == 'reloaded')
        status = EXIT_OK
    except LoggableError as error:
        status = error.exit_status
        if verb == 'reloaded':
            # Nobody may see its stderr any more.
            logging.getLogger('torque.main').error('%s', error)
        else:
            print_error(str(error))
    finally:
        if writer is not None:
            report_start(writer, status)
    if status == EXIT_OK:
        serve_page(daemon)
        daemon.serve(verb)
        status = daemon.exit_status
    return status


def run_demo(arguments) -> int:
    """Run torque beside a stand-in of rTorrent, all in a temporary folder."""
    import tempfile
    if arguments.check_files:
        raise UserError('--demo has no files that could be read again')
    arguments.daemon = False
    # From the first moment on, SIGTERM takes the folder away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix='torque-demo-') as folder:
        path = os.path.join(folder, 'torque.ini')
        replace_file(path, DEMO_INI)
        fill_history(folder)
        Config.make_engine = StandIn
        return run_daemon(arguments, path)


OPTIONS = {                             # names=what it takes: help
    '-c --config=FILE': 'configuration; left out: torque.ini, $XDG_CONFIG_HOME/torque/torque.ini '
                        '(~/.config), ~/.pyroscope/torque.ini, else the defaults',
    '--log-file=FILE': 'log to a file instead of stderr',
    '--pid-file=FILE': 'left out, torque.pid in the state folder',
    '-n --dry-run': 'change nothing, only say what would be',
    '-v --verbose': 'log more of what jobs do',
    '-q --quiet': 'log only warnings and errors',
    '--debug': 'log everything, with the traceback of any failure',
    '--daemon': 'go into the background',
    '--fg --no-fork': 'stay in the foreground, as it is without --daemon',
    '--cron': 'as --daemon, and silent when it is running already',
    '--stop': 'end the daemon that runs with this configuration (-c), and wait until it is gone',
    '--restart': 'end it, if it runs, and start another in the background, with the options given '
                 'now: its -n and -D are not kept',
    '--status': 'show the daemon that runs with this configuration (-c), and its jobs',
    '--json': 'with --status: for programs',
    '--reload': 'check the files, and have the daemon that runs with this configuration (-c) start '
                'over from them',
    '--check': 'check the configuration, show what would run',
    '--list-jobs': 'show built-in jobs and their options',
    '--run-once=JOB': 'run one job now, active or not, and exit',
    '--demo': 'run beside a stand-in of rTorrent, with a page to look at',
    '--explain=FILE': 'show what each TreeWatch would do with a metafile'}
# Of these there can be one
MODES = ('--stop', '--restart', '--status', '--reload', '--check', '--list-jobs', '--run-once',
         '--demo', '--explain')


def parse_arguments(words):
    """Return the command line's options."""
    import argparse
    statuses = (__doc__ or '').rpartition('\n\n')[2]
    parser = argparse.ArgumentParser(prog='torque', epilog=statuses,
                                     description='Run jobs on a schedule beside rTorrent.')
    modes = parser.add_mutually_exclusive_group()
    for option, text in OPTIONS.items():
        names, _, metavar = option.partition('=')
        kind: dict = {'action': 'store_true'}
        if metavar:
            kind = {'metavar': metavar}
        place: Any = parser
        if names in MODES:
            place = modes
        place.add_argument(*names.split(), help=text, **kind)
    parser.add_argument('-D', dest='define', metavar='KEY=VALUE', action='append', default=[],
                        help='set a key of [TORQUE], or section.KEY, over the file')
    modes.add_argument('--grafana', nargs='?', choices=('influxdb', 'prometheus'),
                        const='influxdb', help='print a dashboard for that source of data')
    parser.add_argument('--version', action='version', version=f'torque {VERSION}')
    parser.add_argument('--check-files', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.json and not arguments.status:
        parser.error('--json goes with --status')
    if arguments.restart or arguments.cron:
        arguments.daemon = True
    if arguments.fg:
        arguments.daemon = False
    return arguments


def obey(arguments):
    """Do what the command line says; return the exit status."""
    set_up_log(log_level(arguments), arguments.log_file)
    if arguments.list_jobs:
        return list_jobs()
    if arguments.grafana:
        print(json.dumps(dashboard(arguments.grafana), indent=1))
        return EXIT_OK
    if arguments.demo:
        return run_demo(arguments)
    path = arguments.config or first_file(INI_FILES) or NO_INI
    if arguments.status or arguments.stop or arguments.reload:
        return control(arguments, path)
    if arguments.check_files:
        return check_files(arguments, path)
    if not arguments.explain and not arguments.check and arguments.run_once is None:
        run_from_byte_code()
        return run_daemon(arguments, path)
    load(arguments, path)
    if arguments.explain:
        return explain(config_ini, arguments.explain)
    if arguments.check:
        return check(config_ini, find_pid_file(arguments, path))
    return run_once(config_ini)


def take_place():
    """Make this the module torque, whatever it was started from."""
    global __file__
    # `import torque` in a module of jobs gives this program, not a second copy of it.
    sys.modules['torque'] = sys.modules[__name__]
    source = os.path.abspath(main.__code__.co_filename)
    if BYTE_CODE:
        # Python takes the folder of the byte code for that of the program.
        if sys.path[-1:] == [os.path.dirname(__file__)]:
            sys.path[-1] = os.path.dirname(source)
        sys.argv[0] = source
    __file__ = source


def main(words=None):
    """Run the command line and return the exit status."""
    take_place()
    arguments = parse_arguments(words)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end in a traceback.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors='backslashreplace')       # type: ignore[union-attr]
    # A standard stream that is closed must not become a file of ours.
    fd = os.open(os.devnull, os.O_RDWR)
    while fd < 3:
        fd = os.dup(fd)
    os.close(fd)
    try:
        status = obey(arguments)
        print(end='', flush=True)
        return status
    except LoggableError as error:
        print_error(str(error))
        return error.exit_status
    except BrokenPipeError:
        # The reader of a pipe is gone, as with `--list-jobs | head`.
        return EXIT_OK
    except OSError as error:
        # As on a full disk.
        print_error(f'torque: {error}')
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_FAILED


if __name__ == '__main__':
    end_process(main())
