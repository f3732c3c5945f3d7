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
    RPC                 SCGI and HTTP, XML-RPC and JSON-RPC, Proxy
    Engine              one rTorrent: where it is, what it offers, its figures
    Files               what a path leads to, what rTorrent sees of it; whole copies
    Fields and Filter   what is known of a torrent; conditions on it
    Torrents            rows, lists in one round trip; metafiles
    Data                whose data it is; removals that are written down first
    Template            text and commands with values put in
    Jobs                Job, and the built-in ones
    Config              torque.ini -> Config -> jobs
    Daemon              pid file, status, reload, what is remembered
    Command line        arguments, log, main

Exit status: 0 fine, 1 a job failed, 2 usage, 69 not running, 75 running already,
78 configuration.
"""
from __future__ import annotations

import sys

if __name__ == '__main__':              # nothing beside this file may shadow a library
    sys.path.append(sys.path.pop(0))

import ast
import binascii
import bisect
import collections
import contextlib
import errno
import fnmatch
import functools
import heapq
import itertools
import json
import logging
import logging.handlers
import operator
import os
import queue
import random
import re
import select
import shlex
import socket
import stat
import struct
import threading
import time
from datetime import date, datetime, timedelta
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Tuple

# Imported where they are first needed, because they cost most of the start-up time:
# argparse, gzip, importlib, urllib.request, xmlrpc.client (brings ssl), zoneinfo.

VERSION = '1.0'
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING, EXIT_RUNNING, EXIT_CONFIG = 0, 1, 2, 69, 75, 78


# --- Errors ----------------------------------------------------------------------------------
# Every error that a user can cause or cure is a LoggableError: it is shown as one line, never
# as a traceback. The layer that finds it names the value; the layers above add the place.

class LoggableError(Exception):
    """Something went wrong that one line explains; `told` when the log has that line already."""
    told = False
    pause: float | None = None          # seconds that the other side asks to wait


class UserError(LoggableError):
    """The configuration or the command line is wrong: nothing but its author can mend it.

    A job that is made may say of which of its options it speaks.
    """

    option = ''

    def __init__(self, *text: Any, option: str = ''):
        super().__init__(*text)
        self.option = option


class RpcError(LoggableError):
    """A call to rTorrent failed; `code` is the fault's code, None where there was no fault."""

    def __init__(self, message: str, code: int | None = None):
        super().__init__(message)
        self.code = code


class Unreachable(RpcError):
    """There was no answer at all: rTorrent is not there, silent, or broke off."""


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
DURATION = re.compile(rf'{NUMBER}|(?:{NUMBER}\s*[wdhms]\s*){{1,5}}')
DURATION_PART = re.compile(rf'({NUMBER})\s*([wdhms]?)')
DURATION_UNITS = {
    'w': 604800,
    'd': 86400,
    'h': 3600,
    'm': 60,
    's': 1}
# In seconds: dates and timeouts of the system hold no more than some centuries.
LONGEST = 10000 * DURATION_UNITS['w']
SIZE = re.compile(rf'({NUMBER})\s*([bkmgt]?)(?:i?b)?')
SIZE_UNITS = {
    '': 1,
    'b': 1,
    'k': 1 << 10,
    'm': 1 << 20,
    'g': 1 << 30,
    't': 1 << 40}
SHOWN_UNITS = (                         # and the digits behind the point
    ('B', 0),
    ('KiB', 0),
    ('MiB', 1),
    ('GiB', 1))


def parse_bool(text: Any) -> bool:
    """Return the truth that a word stands for."""
    word = str(text).strip().lower()
    if word in TRUE:
        return True
    if word in FALSE:
        return False
    raise UserError(f'{text!r} is neither yes nor no; allowed are yes no true false on off 1 0')


def parse_duration(text: Any) -> float:
    """Return the seconds in a length of time; a bare number is seconds.

    >>> parse_duration('1h30m'), parse_duration('0.25'), parse_duration(15)
    (5400.0, 0.25, 15.0)
    """
    spelt = str(text).strip().lower()
    seconds, units = 0.0, []
    if DURATION.fullmatch(spelt):
        for number, unit in DURATION_PART.findall(spelt):
            seconds += float(number) * DURATION_UNITS[unit or 's']
            units.append(unit)
    if not units or len(set(units)) < len(units) or seconds > LONGEST:
        raise UserError(f'{text!r} is not a length of time; allowed are e.g. 15s 5m 1h30m 2d, '
                        'up to 10000w')
    return seconds


def parse_size(text: Any) -> int:
    """Return the bytes in a size; units are powers of 1024.

    >>> parse_size('1.5k'), parse_size('4G')
    (1536, 4294967296)
    """
    match = SIZE.fullmatch(str(text).strip().lower())
    if not match:
        raise UserError(f'{text!r} is not a size; allowed are e.g. 100m 4g 1.5t')
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def parse_count(text: Any) -> int:
    """Return a whole number, zero or more."""
    if not re.fullmatch('[0-9]{1,18}', str(text).strip()):
        raise UserError(f'{text!r} is not a whole number of 0 or more')
    return int(text)


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
    for unit, digits in SHOWN_UNITS:
        if abs(number) < 1024:
            return f'{number:.{digits}f} {unit}'
        number /= 1024
    return f'{number:.1f} TiB'


CONTROL = {number: f'\\x{number:02x}' for number in [*range(32), *range(127, 160)]}
CONTROL.update({0x2028: '\\u2028', 0x2029: '\\u2029'})


def one_line(text: str) -> str:
    """Return text with control characters escaped, so that it stays one line of a log."""
    return text.translate(CONTROL).encode('utf-8', 'backslashreplace').decode()


def quoted(text: Any, limit: int = 200) -> str:
    """Return hostile text fit for one log line: quoted, escaped, not endless.

    >>> print(quoted('a\\nb'))
    'a\\nb'
    """
    shown = repr(str(text))
    if len(shown) > limit:
        shown = shown[:limit - 3] + '...'
    return shown


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for a misspelt word, or nothing."""
    import difflib
    for close in difflib.get_close_matches(word, known, 1):
        return f'; did you mean {close!r}?'
    return ''


# --- Schedule --------------------------------------------------------------------------------
# Text enters, a Schedule leaves; its next(after) maps Unix seconds to the first due time after
# them. Nothing here looks at a clock. An Interval counts elapsed seconds from a start. A
# Calendar matches wall time: `wall` is a naive datetime as a clock on the wall shows it, and
# a clock change is where the distance between wall and Unix seconds (the offset) jumps.

WEEKDAYS = ('mon', 'tue', 'wed', 'thu', 'fri', 'sat', 'sun')
MONTHS = ('jan', 'feb', 'mar', 'apr', 'may', 'jun', 'jul', 'aug', 'sep', 'oct', 'nov', 'dec')
POSITIONS = {'1st': 0, '2nd': 1, '3rd': 2, '4th': 3, '5th': 4, 'last': -1}
SECOND, DAY = timedelta(seconds=1), timedelta(1)


class Field(NamedTuple):
    """One part of a calendar schedule: its range, and the names of its values."""
    name: str
    low: int
    high: int
    names: tuple = ()


FIELDS = {field.name: field for field in (
    Field('year', 1970, 9999), Field('month', 1, 12, MONTHS), Field('day', 1, 31),
    Field('week', 1, 53), Field('day_of_week', 0, 6, WEEKDAYS), Field('hour', 0, 23),
    Field('minute', 0, 59), Field('second', 0, 59))}
CRON_WEEKDAY = Field('day of week', 0, 7, WEEKDAYS[6:] + WEEKDAYS[:6])
CRON_FIELDS = ('minute', 'hour', 'day', 'month', 'day_of_week', 'second')
CRON_NAMES = {'@hourly': '0 * * * *', '@daily': '0 0 * * *', '@midnight': '0 0 * * *',
              '@weekly': '0 0 * * 0', '@monthly': '0 0 1 * *', '@yearly': '0 0 1 1 *',
              '@annually': '0 0 1 1 *'}


def field_value(word: str, field: Field) -> int:
    """Return the number that a word means in a field: digits, or a name such as `mon`."""
    if word in field.names:
        return field.names.index(word) + field.low
    if not re.fullmatch('[0-9]{1,4}', word) or not field.low <= int(word) <= field.high:
        also = f' or {field.names[0]} ... {field.names[-1]}' if field.names else ''
        raise UserError(f'{field.name} {word!r} is not in {field.low}-{field.high}{also}')
    return int(word)


def parse_field(text: str, field: Field) -> frozenset:
    """Return the numbers that a field allows; for a position among days (its index, weekday).

    part ::= ('*' | value | value '-' value) ['/' step] | 'last' | position weekday
    field ::= part (',' part)*

    >>> sorted(parse_field('0-20/10,30', FIELDS['minute']))
    [0, 10, 20, 30]
    """
    allowed: set = set()
    for part in text.lower().split(','):
        position, _, weekday = part.strip().partition(' ')
        if field.name == 'day' and position in POSITIONS and (weekday or position == 'last'):
            allowed.add((POSITIONS[position],
                         field_value(weekday.strip(), FIELDS['day_of_week']) if weekday else None))
            continue
        match = re.fullmatch(r'\s*(?:(\*)|(\w+)(?:-(\w+))?)(?:/([0-9]{1,9}))?\s*', part)
        if not match:
            raise UserError(f'{field.name} {part!r} is not understood; '
                            'allowed are * */n a a-b a-b/n and lists of these')
        star, first, last, step = match.groups()
        low = field.low if star else field_value(first, field)
        high = field_value(last, field) if last else field.high if star or step else low
        if field is CRON_WEEKDAY and last == 'sun' and low:
            high = 7                                    # sat-sun
        elif field is CRON_WEEKDAY and step and not last:
            low, high = low % 7, 6                      # 7 is Sunday once more
        if low > high:
            raise UserError(f'{field.name} {part!r} is an empty range; '
                            f'write {first}-{field.high},{field.low}-{last} to go round')
        if step and not 0 < int(step) <= field.high - field.low:
            raise UserError(f'{field.name} {part!r} has a step that is '
                            f'not in 1-{field.high - field.low}')
        allowed.update(range(low, high + 1, int(step or 1)))
    return frozenset(allowed)


class Schedule:
    """When a job is due. `jitter` is the most seconds a run may be put off, at random."""
    jitter = 0.0
    elapsed = False                     # True: next() takes and gives elapsed, not Unix seconds
    every_hour = True                   # follows real time through clock changes

    def next(self, after: float) -> float | None:
        """Return the first due time after `after`, None when there is none any more."""
        raise NotImplementedError


class Interval(Schedule):
    """Every so many seconds, counted from `start` without drift.

    >>> Interval(15).next(31)
    45.0
    """
    elapsed = True

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, 0.0

    def next(self, after: float) -> float:
        count = (after - self.start) // self.seconds + 1
        due = self.start + count * self.seconds         # by one formula: no rounding adds up
        return due if due > after else self.start + (count + 1) * self.seconds


class Calendar(Schedule):
    """Wall times whose every part is allowed, in local time or the time zone `zone`.

    texts: the fields that are given, by name; those left out are `*`, but finer than the
    finest given one they start at their lowest value. cron: Sunday is 0, and day and
    day_of_week are alternatives where both are restricted. Where every hour is allowed, due times
    follow real time through clock changes. Else they keep to the wall: what a change skips
    is one run right after the gap, what comes twice runs the first time.
    """

    def __init__(self, texts: dict[str, str], zone: Any = None, cron: bool = False):
        finest = max(list(FIELDS).index(name) for name in texts)
        allowed: dict = {}
        for index, (name, field) in enumerate(FIELDS.items()):
            every = index < finest or name in ('week', 'day_of_week')
            allowed[name] = range(field.low, (field.high if every else field.low) + 1)
            if name in texts:
                allowed[name] = parse_field(
                    texts[name], CRON_WEEKDAY if cron and name == 'day_of_week' else field)
        (self.years, months, self.monthdays, self.weeks, self.weekdays, hours, minutes,
         seconds) = allowed.values()
        self.first_year = min(self.years)
        self.months, self.seconds = sorted(months), sorted(seconds)
        self.minutes: list[int] = sorted(60 * hour + each for hour in hours for each in minutes)
        if cron:
            self.weekdays = {(number + 6) % 7 for number in self.weekdays}
        self.either = cron and not (                    # as croniter decides
            '*' in texts['day'].split(',') + texts['day_of_week'].split(',')
            or len(self.monthdays) == 31 and '*' in texts['day_of_week']
            or len(self.weekdays) == 7 and '*' in texts['day'])
        self.days = functools.lru_cache(64)(self.matching_days)
        self.zone, self.every_hour = zone, len(hours) == 24

    def matching_days(self, year: int, month: int) -> list[date]:
        """Return the days of one month that are allowed, in order."""
        if year not in self.years or month not in self.months:
            return []
        days = [date(year, month, 1) + DAY * number for number in range(31)]
        days = [day for day in days if day.month == month]
        allowed = {day for day in days if day.day in self.monthdays}
        for index, weekday in (day for day in self.monthdays if isinstance(day, tuple)):
            among = [day for day in days if weekday in (None, day.weekday())]
            allowed.update(among[index:][:1])
        combine = any if self.either else all
        return [day for day in days
                if combine((day in allowed, day.weekday() in self.weekdays))
                and day.isocalendar()[1] in self.weeks]

    def day_after(self, day: date) -> date:
        """Return the first allowed day after one; ValueError: there is none."""
        first = max(day.year, self.first_year)
        for year in range(first, first + 401):      # the calendar repeats by then
            for month in self.months:
                for found in self.days(year, month):
                    if found > day:
                        return found
        raise ValueError('there is no such date')

    def wall_from(self, wall: datetime) -> datetime:
        """Return the first allowed wall time that is `wall` or later; ValueError: there is none."""
        day, now = wall.date(), 60 * wall.hour + wall.minute
        second = bisect.bisect_left(self.seconds, wall.second)
        minute = bisect.bisect_left(self.minutes, now + (second == len(self.seconds)))
        if minute == len(self.minutes) or day not in self.days(day.year, day.month):
            day, minute, second = self.day_after(day), 0, 0
        elif self.minutes[minute] > now:
            second = 0
        return datetime(day.year, day.month, day.day, *divmod(self.minutes[minute], 60),
                        self.seconds[second])

    def wall(self, seconds: float) -> datetime:
        """Return the naive wall time at Unix seconds; its `fold` is 1 when it comes again."""
        return datetime.fromtimestamp(seconds, self.zone).replace(tzinfo=None)

    def unix(self, wall: datetime) -> int:
        """Return the Unix seconds of a naive wall time; `fold` 1 means its second coming."""
        return int(wall.replace(tzinfo=self.zone).timestamp())

    def change(self, low: int, high: int) -> int:
        """Return the first second after `low` that has the offset of `high`."""
        def zero(seconds: int) -> datetime:         # what the wall shows at 0 by this offset
            return self.wall(seconds) - timedelta(0, seconds)
        after = zero(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if zero(middle) == after else (middle, high)
        return high

    def next(self, after: float) -> float | None:
        """Return the first due time after `after`; before the year 10000, else None."""
        start = int(after // 1) + 1
        try:
            return self.by_real_time(start) if self.every_hour else self.by_wall(start)
        except (OverflowError, ValueError):         # no such date, or beyond the year 9999
            return None

    def by_real_time(self, start: int) -> int:
        """Return the first second from `start` on whose wall time is allowed."""
        while True:
            wall = self.wall(start)
            found = self.wall_from(wall)
            ahead = min(found - wall, DAY)          # no two changes lie within a day
            end = start + ahead // SECOND
            seen = self.wall(end)
            if seen - wall != ahead:
                start = self.change(start, end)
            elif seen == found:
                return end
            else:
                start = max(end, self.unix(found - DAY))

    def by_wall(self, start: int) -> int:
        """Return the first second from `start` on that is allowed and not a repetition."""
        wall = self.wall(start - 1)                 # `start` may be right after a gap
        if wall.fold:                               # go to where the repetition ends
            wall = self.wall(self.change(self.unix(wall.replace(fold=0)), start - 1) - 1)
        found = self.wall_from(wall + SECOND)
        seconds = self.unix(found)
        if self.wall(seconds) == found:
            return seconds
        return self.change(self.unix(found.replace(fold=1)), seconds)       # skipped


class Croniter(Calendar):
    """A cron expression beyond torque's grammar, as the croniter package reads it."""

    def __init__(self, text: str, zone: Any = None):
        try:
            import croniter                         # type: ignore
            croniter.croniter(text, datetime(2000, 1, 1))
        except ImportError:
            raise UserError(f'{text!r} needs croniter, which is not installed; without it cron '
                            'has five fields of * */n a a-b a-b/n and names') from None
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f'croniter refuses {text!r}: {error}') from None
        self.text, self.croniter = text, croniter.croniter
        self.zone, self.every_hour = zone, text.split()[1] == '*'

    def wall_from(self, wall: datetime) -> datetime:
        return self.croniter(self.text, wall - SECOND).get_next(datetime)


def parse_zone(name: str) -> Any:
    """Return the time zone named `Area/City`."""
    try:
        import zoneinfo
        return zoneinfo.ZoneInfo(name)
    except ImportError:
        raise UserError(f'timezone {name!r} needs Python 3.9; local time does not') from None
    except (KeyError, ValueError, OSError):
        raise UserError(f'timezone {name!r} is not known on this machine; allowed are names '
                        'such as Europe/Berlin, where time zone data is installed') from None


def parse_plain(words: list[str], zone: Any) -> Schedule:
    """Return the Schedule of an interval or a cron expression, split into words."""
    text = ' '.join(words)
    if words[0].lower() == 'every' or len(words) == 1 and text.lower() not in CRON_NAMES:
        if f'@{text.lower()}' in CRON_NAMES:
            raise UserError(f"{text!r} is no schedule; did you mean '@{text.lower()}'?")
        seconds = parse_duration(re.sub(r'(?i)^every\s*', '', text))
        if seconds < 0.1:
            raise UserError(f'interval {text!r} is too short; at least 0.1s is allowed')
        return Interval(seconds)
    text = CRON_NAMES.get(text.lower(), text)
    words = text.split()
    unnamed = re.sub('|'.join(WEEKDAYS + MONTHS), '', text.lower())
    if len(words) in (6, 7) or len(words) == 5 and re.search('[lw#?]', unnamed):
        return Croniter(text, zone)
    if len(words) != 5:
        raise UserError(f'{text!r} has {len(words)} words; cron has five fields: '
                        'minute hour day month weekday')
    return Calendar(dict(zip(CRON_FIELDS, [*words, '0'])), zone, cron=True)


def parse_schedule(text: str) -> Schedule:
    """Return the Schedule that a text spells: an interval, fields, or cron.

    schedule ::= (interval | fields | cron) ['jitter=' duration] ['timezone=' Area/City]

    >>> parse_schedule('every 1h30m').next(0), parse_schedule('*/5 * * * *').next(60)
    (5400.0, 300)
    """
    fields: dict[str, str] = {}
    plain = []
    try:
        words = shlex.split(str(text))
    except ValueError as error:
        raise UserError(f'schedule {text!r}: {error}') from None
    for word in words:
        name, equals, value = word.partition('=')
        if not equals:
            plain.append(word)
        elif name in fields:
            raise UserError(f'schedule field {name!r} is given twice')
        elif name not in FIELDS and name not in ('jitter', 'timezone'):
            raise UserError(f'schedule field {name!r} is not known; allowed are '
                            f"{' '.join(FIELDS)} jitter timezone{nearest(name, FIELDS)}")
        else:
            fields[name] = value
    jitter = parse_duration(fields.pop('jitter', 0))
    zone = parse_zone(fields.pop('timezone')) if 'timezone' in fields else None
    if bool(fields) == bool(plain):
        raise UserError(f'schedule {text!r} is not understood; allowed are an interval '
                        '(every 15s), fields (hour=*/2 minute=5) or cron (*/5 * * * *)')
    schedule = Calendar(fields, zone) if fields else parse_plain(plain, zone)
    schedule.jitter = jitter
    if schedule.next(0) is None:
        raise UserError(f'schedule {text!r} can never fire: there is no such date')
    return schedule


# --- Scheduler -------------------------------------------------------------------------------
# Tasks enter: a name, a Schedule, and a function to call. Two heaps hold due times, one in Unix
# seconds and one in elapsed seconds (which no clock change touches, and which go on while the
# machine sleeps). tick() is pure: both times in, tasks to start and seconds to sleep out. A
# task never overlaps itself: what comes due during its run is merged into one run after it.

MAX_SLEEP = 30                  # seconds; a changed clock is noticed within this time
TRACE = 5                       # log level of --debug: tracebacks of any failure
PATIENCE = 0.005                # seconds all workers may be busy before one more is started
SPARE_WORKERS = 8               # idle threads that are kept
MOST_MISSED = 1000              # due times that are counted one by one


def elapsed_time() -> float:
    """Return seconds that no clock change touches; where the system can, sleep counts too."""
    return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))


class Repeats:
    """Tells which of many like events deserve a line in the log.

    The first does; later ones are counted, and summed up after pauses that double from one
    minute to one hour. `now` is elapsed seconds.
    """

    def __init__(self) -> None:
        self.rows: dict = {}            # kind -> [count, since, said, pause, recovered]

    def seen(self, kind: Any, now: float) -> tuple[int, float] | None:
        """Return (0, 0) to say it in full, (times, seconds) to sum up, None for silence."""
        row = self.rows.get(kind)
        if row is None or (row[4] and now - row[2] > row[3]):
            if len(self.rows) >= 100:
                self.rows.clear()
            self.rows[kind] = [1, now, now, 60.0, False]
            return 0, 0.0
        row[0], row[4] = row[0] + 1, False
        if now - row[2] < row[3]:
            return None
        row[2], row[3] = now, min(row[3] * 2, 3600.0)
        return row[0], now - row[1]

    def recovered(self) -> None:
        """What comes after its pause now is new again, not one more of the same."""
        for row in self.rows.values():
            row[4] = True


def error_text(error: BaseException) -> str:
    """Return the text of an error; its class where there is none, or that is broken, too."""
    with contextlib.suppress(Exception):
        return str(error) or type(error).__name__
    return type(error).__name__


class Task:
    """One job as the scheduler sees it, and how it has gone so far."""
    due = last_due = None               # type: float | None    # in the clock of the schedule
    last_start = running_since = None   # type: float | None    # Unix seconds
    last_duration: float | None = None
    last_error: str | None = None
    runs = failures = missed = waiting = 0
    overdue = removed = False
    after_end: Callable[[], None] | None = None     # once it is removed and has ended
    failing: tuple | None = None        # elapsed seconds at first, was it said, times

    def __init__(self, name: str, schedule: Schedule, run: Callable[[], Any],
                 max_runtime: float | None = None, log: Any = None, at_start: bool = False):
        self.at_start = at_start                # a calendar task is due at once, too
        self.name, self.schedule, self.run, self.max_runtime = name, schedule, run, max_runtime
        self.log = log or logging.getLogger('torque.' + name)
        self.repeats = Repeats()

    def failed(self, error: BaseException, now: float) -> None:
        """Count a failure and log it: in full once, then summed up."""
        self.failures += 1
        known = isinstance(error, LoggableError)
        self.last_error = ('' if known else f'{type(error).__name__}: ') + error_text(error)
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        row = self.repeats.seen(
            re.sub(r"""'[^']*'|"[^"]*"|\b[\da-fA-F]{8,}\b|[\d.]+""", '#', self.last_error)
            if known or not trace else (type(error), trace.tb_frame.f_code, trace.tb_lineno), now)
        told = getattr(error, 'told', False)
        since, said, times = self.failing or (now, False, 0)
        self.failing = since, said or (row is not None and not told), times + 1
        if row is None or told:
            self.log.debug('failed again: %s', self.last_error)
            return
        prefix = f'still failing, {row[0]} times in {show_duration(row[1])}: ' if row[0] else ''
        traced = self.log.isEnabledFor(TRACE) if known else not prefix
        self.log.log(logging.WARNING if known else logging.ERROR, '%s%s', prefix, self.last_error,
                     exc_info=error if traced else None)

    def merged(self, times: int, when: str, now: float) -> None:
        """Note that due times became one run, without flooding the log."""
        self.missed += times - 1
        row = self.repeats.seen(when, now)
        if row is not None:
            again = f' ({row[0]} times in {show_duration(row[1])})' if row[0] else ''
            self.log.info('%d runs came due %s, merged into one%s', times, when, again)

    def worked(self, now: float) -> None:
        """Note that a run went well, and say so when the last failure was said."""
        self.last_error = None
        if self.failing:
            since, said, times = self.failing
            if said:
                self.log.info('works again, after %d failures in %s', times,
                              show_duration(now - since))
            self.failing = None
            self.repeats.recovered()


class Scheduler:
    """Starts tasks when they are due, each run in a worker thread to itself."""

    def __init__(self, wall: Callable[[], float] = time.time,
                 elapsed: Callable[[], float] = elapsed_time):
        self.wall, self.elapsed = wall, elapsed
        self.offset = wall() - elapsed()
        self.tasks: dict[str, Task] = {}
        # of (when, name, delay by jitter, task), the first in Unix, the second in elapsed seconds
        self.heaps: tuple[list, list] = [], []
        self.limits: dict[Task, float] = {}     # elapsed seconds when a run becomes overdue
        self.lock = threading.Lock()            # guards running_since, waiting, idle, workers
        self.work: queue.SimpleQueue = queue.SimpleQueue()
        self.mail: queue.SimpleQueue = queue.SimpleQueue()      # signal handlers may put here
        self.idle = self.workers = 0            # idle: those of the workers without a run
        self.patience = PATIENCE
        self.stopping = self.hurry = False
        self.repeats = Repeats()
        self.log = logging.getLogger('torque.scheduler')

    def add(self, task: Task) -> Task:
        """Register a task; an interval is due now, a calendar at its next date."""
        self.tasks[task.name] = task
        if isinstance(task.schedule, Interval):
            task.schedule.start = task.due = self.elapsed()
        else:
            task.due = self.wall() if task.at_start else task.schedule.next(self.wall())
        self.push(task)
        return task

    def remove(self, name: str) -> Task:
        """Take a task out; a run in progress goes on."""
        task = self.tasks.pop(name)
        task.removed = True
        for heap in self.heaps:                 # they would keep the job in memory until it is due
            heap[:] = [entry for entry in heap if entry[-1] is not task]
            heapq.heapify(heap)
        if task.running_since is None:
            self.limits.pop(task, None)
        return task

    def push(self, task: Task) -> None:
        """Enter the task's due time into the heap of its clock."""
        if task.due is not None:
            delay = random.uniform(0, task.schedule.jitter) if task.schedule.jitter else 0
            heapq.heappush(self.heaps[task.schedule.elapsed],
                           (task.due + delay, task.name, delay, task))

    def next_run(self, task: Task) -> float | None:
        """Return the Unix seconds of a task's next due time."""
        if task.due is None or not task.schedule.elapsed:
            return task.due
        return self.wall() + task.due - self.elapsed()

    # What follows up to tick() is the pure part.

    def come_due(self, task: Task, delay: float, now: float) -> bool:
        """Move a task to its next due time; tell whether a run is to start."""
        times = 0
        while task.due is not None and task.due + delay <= now:
            task.last_due, times = task.due, times + 1
            task.due = task.schedule.next(task.due if times <= MOST_MISSED else now)
        self.push(task)
        with self.lock:
            if task.running_since is not None:
                task.waiting += times
                return False
            task.running_since = self.wall()
        if times > 1:
            task.merged(times, 'while the machine or torque was held up', self.elapsed())
        return True

    def tick(self, wall: float, elapsed: float) -> tuple[list[Task], float]:
        """Return the tasks that are to start now, and the seconds until the next look."""
        step = self.offset - (wall - elapsed)
        self.offset = wall - elapsed
        if step > 0.5:
            self.log.info('the clock was set back by %s', show_duration(step))
            self.heaps[False].clear()
            for task in self.tasks.values():
                if not task.schedule.elapsed:
                    again = step >= (60 if task.schedule.every_hour else 3 * 3600)
                    after = wall if again else max(wall, task.last_due or wall)
                    task.due = task.schedule.next(after)
                    self.push(task)
        ready: list[Task] = []
        sleep: float = MAX_SLEEP
        for task, limit in list(self.limits.items()):   # before new runs begin
            if task.running_since is None:
                del self.limits[task]
            elif limit > elapsed:
                sleep = min(sleep, limit - elapsed)
            else:
                del self.limits[task]
                task.overdue = True
                row = task.repeats.seen('overdue', elapsed)
                task.log.log(logging.WARNING if row else logging.DEBUG, 'still running after %s, '
                             'its max_runtime', show_duration(task.max_runtime or 0))
        for heap, now in zip(self.heaps, (wall, elapsed)):
            while heap and heap[0][0] <= now:
                _, _, delay, task = heapq.heappop(heap)
                if self.come_due(task, delay, now):
                    ready.append(task)
            if heap:
                sleep = min(sleep, heap[0][0] - now)
        return ready, sleep

    # From here on there are threads.

    def start(self, task: Task) -> None:
        """Hand a run to the workers; running_since is set already."""
        if self.stopping:                       # it came due during its last run
            task.running_since = None
            return
        if task.max_runtime:
            self.limits[task] = self.elapsed() + task.max_runtime
        self.work.put(task)

    def add_workers(self, most: int) -> None:
        """Start threads for runs that wait for one."""
        for _ in range(min(most, self.work.qsize() - self.idle)):
            try:
                threading.Thread(target=self.worker, daemon=True).start()
            except RuntimeError as error:               # no more threads: try again later
                self.patience = 1.0
                if self.repeats.seen('threads', self.elapsed()):
                    self.log.error('no new worker thread: %s; %d are there', error, self.workers)
                return
            with self.lock:
                self.idle += 1
                self.workers += 1
            self.patience = PATIENCE

    def worker(self) -> None:
        """Run tasks until there are more than enough idle workers."""
        while True:
            task = self.work.get()
            with self.lock:
                self.idle -= 1
            self.run_task(task)
            with self.lock:
                if self.idle >= SPARE_WORKERS:
                    self.workers -= 1
                    return
                self.idle += 1

    def run_task(self, task: Task) -> None:
        """Call a task and note how it went; go on with what came due meanwhile."""
        task.last_start, started = self.wall(), self.elapsed()
        try:
            task.run()
        except BaseException as error:              # SystemExit too must not end a worker
            task.failed(error, self.elapsed())
        else:
            task.worked(self.elapsed())
        ended = self.elapsed()
        task.last_duration, task.overdue = ended - started, False
        with self.lock:
            task.runs += 1
            waited, task.waiting = task.waiting, 0
            again = waited and not self.stopping and not task.removed
            task.running_since = self.wall() if again else None
        if waited > 1 and again:
            task.merged(waited, 'during the last one', ended)
        if again:
            self.mail.put(functools.partial(self.start, task))
        elif self.stopping or task.removed:
            self.mail.put(task.after_end or bool)       # finish() waits for it, too

    def running(self) -> list[Task]:
        """Return the tasks that are running now."""
        return [task for task in self.tasks.values() if task.running_since is not None]

    def serve(self) -> None:
        """Run tasks until stop() is called; functions put into `mail` are called here."""
        while not self.stopping:
            ready, sleep = self.tick(self.wall(), self.elapsed())
            for task in ready:
                self.start(task)
                sleep = min(sleep, task.max_runtime or sleep)
            waiting = self.work.qsize()
            if waiting:
                sleep = min(sleep, self.patience)
                if not self.workers:
                    self.add_workers(1)
            try:
                message = self.mail.get(timeout=max(sleep, 0))
            except queue.Empty:                 # none taken meanwhile: all workers are stuck
                self.add_workers(10 if self.work.qsize() >= waiting else 1)
            else:
                try:
                    message()
                except Exception:
                    self.log.exception('this should not happen')

    def stop(self) -> None:
        """Let serve() return; no new runs start."""
        self.stopping = True

    def interrupt(self) -> None:
        """Stop, and when that is under way already without waiting for runs in progress."""
        self.hurry, self.stopping = self.stopping, True

    def finish(self, grace: float) -> list[Task]:
        """Wait up to `grace` seconds for runs in progress; return those that still run."""
        end = self.elapsed() + grace
        with contextlib.suppress(queue.Empty):
            while True:                         # what has not begun does not begin any more
                self.work.get_nowait().running_since = None
        with contextlib.suppress(queue.Empty):
            while self.running() and not self.hurry:
                self.mail.get(timeout=max(end - self.elapsed(), 0))()
        return self.running()


# --- RPC -------------------------------------------------------------------------------------
# A URL becomes an Address; a request body goes to it within a deadline and the body of the
# answer comes back, over SCGI (one netstring of headers, one request per connection) or HTTP.
# XML-RPC and JSON-RPC texts are made and read here. A Proxy puts it together:
# proxy.d.name(HASH). "where" is an address as it may be shown: never with a password.

RPC_TIMEOUT = 30.0                      # seconds for a whole call
RPC_LIMIT = 256 << 20                   # bytes of one answer
MISSING = (-506, -32601)                # codes of faults: there is no such command
BATCH = 500                             # calls in one request; rTorrent takes 512 KiB at most
HEAD_LIMIT = 8192                       # bytes before the body of an SCGI answer
LOOPBACK = re.compile(r'localhost$|127\.|::1$')


class Address(NamedTuple):
    """Where rTorrent answers: kind is unix, tcp or http; `where` is fit for the log."""
    kind: str
    where: str
    path: str = ''
    host: str = ''
    port: int = 0
    user: str | None = None
    password: str | None = None
    exposed: bool = False               # rTorrent's port is open to the network

    def __repr__(self) -> str:
        return f'<Address {self.where}>'

    def is_local(self) -> bool:
        """Tell whether rTorrent runs on this machine, as far as the address shows."""
        return not self.host or bool(LOOPBACK.match(self.host))


def redacted(text: Any) -> str:
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
    from urllib.parse import unquote, urlsplit
    allowed = ('allowed are scgi://host:port, scgi:///path, a socket path, '
               'http(s)://[user:password@]host/RPC2')
    spelt = os.path.expandvars(text.strip())
    try:
        url = urlsplit(spelt if '://' in spelt else 'scgi://' + spelt)
        host, port = url.hostname or '', url.port or 0
    except ValueError:                          # what it says may hold a password
        raise UserError(f'{redacted(text)!r} is no address; {allowed}') from None
    if url.scheme in ('http', 'https') and host and not url.query and not url.fragment:
        clean = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path or '/RPC2'}"
        return Address('http', clean, clean, host, port, url.username and unquote(url.username),
                       url.password and unquote(url.password))
    path = spelt.partition('://')[2] or spelt
    if url.scheme == 'scgi' and path.startswith(('/', '~')):
        path = os.path.expanduser(path)
        return Address('unix', f'scgi://{path}', path)
    if url.scheme != 'scgi' or not port or url.path.strip('/'):
        raise UserError(f'{redacted(text)!r} is no address; {allowed}')
    everywhere = host in ('', '0.0.0.0', '::')
    exposed = everywhere or not LOOPBACK.match(host)
    host = '127.0.0.1' if everywhere else host
    shown = f'[{host}]' if ':' in host else host
    return Address('tcp', f'scgi://{shown}:{port}', '', host, port, exposed=exposed)


def arm(sock: Any, end: float) -> None:
    """Give a socket what time is left until `end`; raises socket.timeout when there is none."""
    left = end - time.monotonic()
    if left <= 0:
        raise socket.timeout('timed out')
    sock.settimeout(left)


def beginning(content: bytes | bytearray) -> str:
    """Return the first bytes of an answer as text."""
    return bytes(content[:80]).decode('utf-8', 'replace')


def describe(error: OSError) -> str:
    """Return what to say of an error of the system on the way to a server."""
    if isinstance(error, FileNotFoundError):
        return 'there is no such socket: not running?'
    if isinstance(error, ConnectionRefusedError):
        return 'nobody listens there: not running?'
    if isinstance(error, socket.gaierror):
        return f'the host name cannot be resolved: {error.strerror}'
    return f'the connection failed: {error.strerror or error}'


def answer_end(received: bytearray, limit: int) -> int:
    """Return how long an answer will be with its head, 0 while the head is not complete."""
    stop = received.find(b'\r\n\r\n', 0, HEAD_LIMIT)
    if stop < 0 and len(received) < HEAD_LIMIT and b'Status:'.startswith(received[:7]):
        return 0
    head = re.match(rb'Status: *200[^\n]*\n(?:.*\n)?content-length: *(\d{1,15}) *\r\n',
                    received[:stop + 2], re.I | re.S)
    if not head:
        raise Unreachable(f'the answer is not one of rTorrent: {quoted(beginning(received))}')
    if int(head[1]) > limit:
        raise Unreachable(f'the answer is larger than {show_size(limit)}, the limit')
    return stop + 4 + int(head[1])


def scgi_request(address: Address, body: bytes, content_type: str, seconds: float,
                 limit: int) -> bytes:
    """Send one SCGI request and return the body of its answer.

    Raises Unreachable; the text says what happened, the caller adds where and which method.
    """
    head = f'CONTENT_LENGTH\0{len(body)}\0SCGI\0001\0CONTENT_TYPE\0{content_type}\0'
    received, size, state, end = bytearray(), 0, 'connect', time.monotonic() + seconds
    try:
        with socket.socket(socket.AF_UNIX) if address.kind == 'unix' else \
                socket.create_connection((address.host, address.port), seconds) as sock:
            arm(sock, end)
            if address.kind == 'unix':
                sock.connect(address.path)
            state = 'send'
            sock.sendall(b'%d:%s,%s' % (len(head), head.encode(), body))
            state = 'receive'
            while not size or len(received) < size:
                arm(sock, end)
                chunk = sock.recv(1 << 18)
                if not chunk:
                    raise Unreachable(
                        f'the answer broke off after {len(received)} bytes' if received else
                        'the connection was closed without an answer')
                received += chunk
                size = size or answer_end(received, limit)
    except socket.timeout:
        waited = f'{seconds:g} s'
        raise Unreachable(
            f'no connection within {waited}' if state == 'connect' else
            f'only {len(received)} of {size or "?"} bytes came in {waited}' if received else
            f'connected, but no answer in {waited}: reading its session, or hung') from None
    except OSError as error:
        raise Unreachable(f'the connection was closed during a request of {len(body)} bytes: too '
                          'large for it?' if state == 'send' else describe(error)) from None
    if len(received) > size:
        raise Unreachable('the answer is longer than its Content-Length says')
    return bytes(received[received.index(b'\r\n\r\n') + 4:])


class HttpAnswer(NamedTuple):
    """What a web server said; headers.get() takes a name in any case."""
    status: int
    reason: str
    headers: Any
    body: bytes


def http_handler(end: float, close: contextlib.ExitStack) -> Any:
    """Return urllib's handler of both schemes: no read outlasts `end`, errors are answers.

    close: what closes them, for urllib forgets those that asked for a login.
    """
    import http.client
    import urllib.request

    class Reader(socket.SocketIO):
        def readinto(self, buffer: Any) -> int | None:
            arm(self._sock, end)                        # type: ignore[attr-defined]
            return super().readinto(buffer)

    class Response(http.client.HTTPResponse):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.fp.raw.__class__ = Reader              # type: ignore[attr-defined]

    class Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
            timed = type('Timed', (http_class,), {'response_class': Response})
            return close.enter_context(
                super().do_open(timed, req, **options))         # type: ignore[arg-type]

        def http_error_default(self, request: Any, answer: Any, *about: Any) -> Any:
            return answer

    return Handler()


def http_post(url: str, body: bytes, headers: dict, seconds: float, limit: int = 1 << 20,
              user: str | None = None, password: str | None = None) -> HttpAnswer:
    """POST to a web server; it may ask for a login by basic or digest authentication.

    Redirections are not followed. Raises Unreachable when there is no whole answer in time.
    """
    import http.client
    import urllib.error
    import urllib.request as lib
    passwords = lib.HTTPPasswordMgrWithDefaultRealm()
    if user is not None:
        passwords.add_password(None, url, user, password or '')
    digest = lib.HTTPDigestAuthHandler(passwords)
    digest.retried = 5                  # type: ignore  # one try; urllib would make six
    opener, close = lib.OpenerDirector(), contextlib.ExitStack()
    opener.addheaders = [('User-Agent', f'torque/{VERSION}')]
    local = re.match(r'https?://(localhost|127\.|\[::1\])', url)
    for handler in (lib.ProxyHandler({} if local else None), digest, lib.HTTPErrorProcessor(),
                    lib.HTTPBasicAuthHandler(passwords),
                    http_handler(time.monotonic() + seconds, close)):
        opener.add_handler(handler)
    try:
        with close:
            answer = opener.open(lib.Request(url, body, headers), timeout=seconds)
            content = answer.read(limit + 1)
            size = answer.headers.get('Content-Length', '') if answer.code == 200 else ''
        if len(content) > limit:
            raise Unreachable(f'the answer is larger than {show_size(limit)}, the limit')
        if size.isdigit() and int(size) > len(content):
            raise Unreachable(f'the answer broke off after {len(content)} of {size} bytes')
        return HttpAnswer(answer.code, str(answer.reason), answer.headers, content)
    except urllib.error.HTTPError as error:             # a digest login was refused
        return HttpAnswer(error.code, str(error.reason), error.headers, b'')
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, 'reason', error)
        if isinstance(error, http.client.IncompleteRead):
            said = f'the answer broke off after {len(error.partial)} bytes'
        elif isinstance(reason, socket.timeout):
            said = f'no whole answer in {seconds:g} s'
        elif isinstance(reason, OSError):
            said = describe(reason)
        elif 'scheme' in str(reason):
            said = 'HTTP 401: it asks for a login neither basic nor digest'
        else:
            said = f'not an answer of a web server: {quoted(reason)}'
        raise Unreachable(said) from None


def http_request(address: Address, body: bytes, content_type: str, seconds: float,
                 limit: int) -> bytes:
    """Send a request to an HTTP mount of rTorrent and return the body of its answer."""
    answer = http_post(address.path, body, {'Content-Type': content_type}, seconds, limit,
                       address.user, address.password)
    if answer.status == 401:
        raise Unreachable('HTTP 401: user or password is wrong or missing')
    if answer.status != 200 or 'html' in answer.headers.get('content-type', ''):
        raise Unreachable(f'HTTP {answer.status} {answer.reason} instead of an answer of '
                          f'rTorrent: {quoted(beginning(answer.body))}')
    return answer.body


def rpc_fault(fault: Any) -> RpcError:
    """Return the exception for a fault; wordings differ, -506 alone is the same everywhere."""
    if not isinstance(fault, dict):
        return RpcError(f'a fault without a code: {quoted(fault)}')
    code, message = (fault.get('faultCode', fault.get('code')),
                     fault.get('faultString', fault.get('message')))
    if 'info-hash' in str(message):
        return HashNotFound(f'fault {code}: {quoted(message)}', code)
    hint = ('; the web server in between marks its connections as untrusted: use scgi:// here'
            if 'untrusted' in str(message) else '')
    return RpcError(f'fault {code}: {quoted(message)}{hint}', code)


# XML-RPC. rTorrent takes and gives integers of 64 bits as <i8>, which xmlrpc.client refuses to
# send; and expat, below xmlrpc.client, fails over control characters and bytes that are not
# UTF-8, which rTorrent passes on from torrents. So both directions are our own.

def xml_escape(text: Any) -> str:
    """Return text as character data."""
    return str(text).replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')


def xml_value(value: Any) -> str:
    """Return a <value>; numbers are i8, booleans too (older rTorrents refuse <boolean>)."""
    if isinstance(value, str):
        return f'<value><string>{xml_escape(value)}</string></value>'
    if isinstance(value, int):
        return f'<value><i8>{int(value)}</i8></value>'
    if isinstance(value, bytes):
        return f'<value><base64>{binascii.b2a_base64(value).decode()}</base64></value>'
    if isinstance(value, (list, tuple)):
        return f"<value><array><data>{''.join(map(xml_value, value))}</data></array></value>"
    if isinstance(value, dict):
        members = ''.join(f'<member><name>{xml_escape(name)}</name>{xml_value(item)}</member>'
                          for name, item in value.items())
        return f'<value><struct>{members}</struct></value>'
    raise RpcError(f'{type(value).__name__} {quoted(value)} cannot be sent to rTorrent; '
                   'allowed are text, whole numbers, bytes, lists and dicts')


def xml_request(method: str, params: Iterable) -> bytes:
    """Return a methodCall; file names that are not UTF-8 go out as the bytes they are."""
    values = ''.join(f'<param>{xml_value(value)}</param>' for value in params)
    text = (f'<?xml version="1.0"?><methodCall><methodName>{xml_escape(method)}</methodName>'
            f'<params>{values}</params></methodCall>')
    try:
        return text.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError as error:
        raise RpcError(f'{quoted(error.object[error.start])} cannot be sent to rTorrent') from None


# An answer is turned into JSON text by replacing its tags, in this order, and JSON's grammar finds
# what does not fit together. \0, which no XML holds, stands for the end of a value for a while.

XML_AS_JSON = (
    ('\\', r'\\'), ('"', r'\"'), ('<value><string>', '"'), ('</string></value>', '"\0'),
    ('<value><i8>', ''), ('</i8></value>', '\0'), ('<value><i4>', ''), ('</i4></value>', '\0'),
    ('<value><int>', ''), ('</int></value>', '\0'), ('<value><string/></value>', '""\0'),
    ('<value><boolean>0</boolean></value>', 'false\0'),
    ('<value><boolean>1</boolean></value>', 'true\0'),
    ('<value><array><data>', '['), ('</data></array></value>', ']\0'),
    ('<value><array><data/></array></value>', '[]\0'), ('<value><struct/></value>', '{}\0'),
    ('<value><struct>', '{'), ('</struct></value>', '}\0'),
    ('<member>', ''), ('<name>', '"'), ('</name>', '":'), ('</member>', ''),
    ('\r\n', '\n'), ('\r', '\n'),       # line ends are as XML has them
    ('\0]', ']'), ('\0\n]', ']'), ('\0}', '}'), ('\0\n}', '}'), ('\0\n\n}', '}'), ('\0', ','))
XML_ANSWER = re.compile(
    r'\s*(?:<\?xml[^>]*\?>\s*)?<methodResponse>\s*(?:<params>\s*<param>|(<fault>))(.*)'
    r'(?:</param>\s*</params>|</fault>)\s*</methodResponse>\s*', re.S)
XML_ENTITY = re.compile('&(#x?|)([^;]*);?')
XML_ENTITIES = {'lt': '<', 'gt': '>', 'amp': '&', 'quot': '"', 'apos': "'"}


def xml_loads(text: str) -> Any:
    """Return the value in an unusual answer, read by xmlrpc.client."""
    if '<!' in text:
        raise RpcError('the answer has a DTD or the like, which is refused')
    import xmlrpc.client
    try:
        return xmlrpc.client.loads(text, use_builtin_types=True)[0][0]
    except xmlrpc.client.Fault as fault:
        raise rpc_fault(vars(fault)) from None
    except Exception:                           # of many kinds, as the damage has it
        raise RpcError(f'the answer is not XML-RPC: {quoted(text[:80])}') from None


def xml_from_base64(found: re.Match) -> str:
    """Return a base64 element as text: rTorrent sends so what is not UTF-8."""
    text = binascii.a2b_base64(found[1]).decode('utf-8', 'replace')
    return '<string>%s</string>' % xml_escape(text).replace('\r', '&#13;')


def xml_entity(found: re.Match) -> str:
    """Return the character of an entity as JSON has it."""
    base = {'#': 10, '#x': 16}.get(found[1])
    return json.dumps(chr(int(found[2], base)) if base else XML_ENTITIES[found[2]])[1:-1]


def xml_reply(content: bytes) -> Any:
    """Return the value in the body of an answer; raises RpcError for a fault or a non-answer."""
    text = content.decode('utf-8', 'replace').replace('\0', '\ufffd')    # NUL is a mark below
    try:
        if '<base64>' in text:
            text = re.sub('<base64>([^<]*)</base64>', xml_from_base64, text)
        answer = XML_ANSWER.fullmatch(text)
        if not answer:
            raise ValueError('not what rTorrent sends')
        inner = answer[2]
        for tag, mark in XML_AS_JSON:
            inner = inner.replace(tag, mark)
        if '<' in inner:
            raise ValueError('a tag that rTorrent does not send')
        if '&' in inner:
            inner = XML_ENTITY.sub(xml_entity, inner)
        value = json.loads(inner.rstrip('\n,'), strict=False)
    except (ValueError, LookupError, OverflowError, RecursionError):
        return xml_loads(text)
    if answer[1]:
        raise rpc_fault(value)
    return value


# JSON-RPC is answered by 0.15 and later. It is 15 times faster to read and carries every
# character, but a single name that is not UTF-8 turns a whole answer into an error.

JSON_NOT_UTF8 = 'type_error.316'
VERBS = frozenset(      # each begins a part of the name of a command that changes something
    'add adjust call check clear close create delete disable disconnect enable erase filter insert '
    'pause persistent prune push remove resume save set shutdown sort start stop try unset '
    'update'.split())
ACTIONS = frozenset(    # such parts that begin like others which only tell something
    'open open_local open_port open_systemd send_scrape tracker_announce'.split())
READS = frozenset('d f t p view session system throttle network pieces directory download_list '
                  'equal not and or greater less match compare cat value false if'.split())


def only_reads(method: str, params: Iterable) -> bool:
    """Tell whether a call, and the commands in its parameters, change nothing."""
    words = [method]
    for param in params:
        words += re.findall(r'(?<![\w.])[a-z][\w.]*(?==)|(?<=\()[a-z][\w.]*', str(param))
    return all(parts[0] in READS and ACTIONS.isdisjoint(parts)
               and VERBS.isdisjoint(part.partition('_')[0] for part in parts[1:])
               for parts in (word.split('.') for word in words))


def json_request(calls: list[tuple]) -> bytes:
    """Return a request of one call, or a batch; its ids count from 0."""
    items = [{'jsonrpc': '2.0', 'id': number, 'method': method, 'params': [
        'data:application/octet-stream;base64,' + binascii.b2a_base64(param).decode().strip()
        if isinstance(param, bytes) else param for param in params]}
        for number, (method, *params) in enumerate(calls)]
    try:
        return json.dumps(items if len(items) > 1 else items[0]).encode()
    except (TypeError, ValueError) as error:
        raise RpcError(f'this cannot be sent to rTorrent: {error}') from None


def json_reply(content: bytes, count: int) -> list:
    """Return the results of `count` calls, an RpcError in the place of each that failed.

    Raises it where there is no answer to all, as when one text in it is not UTF-8.
    """
    try:
        items = json.loads(content.decode('utf-8', 'replace'))
    except (ValueError, RecursionError):
        items = None
    if isinstance(items, dict):
        if 'error' in items and (count > 1 or JSON_NOT_UTF8 in str(items['error'])):
            raise rpc_fault(items['error'])
        items = [items]
    if not isinstance(items, list) or len(items) != count or not all(
            isinstance(item, dict) for item in items):
        raise RpcError(f'the answer is not JSON-RPC: {quoted(beginning(content))}')
    return [item['result'] if 'result' in item else rpc_fault(item.get('error'))
            for item in items]


# Commands that take arguments as data; others (multicall, branch ...) run them.
DATA_COMMAND = re.compile(r'[dfpt]\.(?!multicall)[\w.]{1,99}|view\.set_(not_)?visible|print|'
                          r'execute[\w.]{0,99}')
RUNS_TEXT = re.compile(r'[dtp]\.multicall|load\.|branch|if|and|or|not|cat|catch|try|equal|less|'
                       r'greater|match|compare|elapsed|view\.(filter|sort)|schedule|method|event')
COMMAND_PIECE = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)|\\.|[^",;\n\\]+|.', re.S)


def split_commands(text: str, marks: str) -> list[str]:
    """Return text split at marks that are outside of double quotes."""
    parts = ['']
    for piece in COMMAND_PIECE.findall(text):
        if piece in marks:
            parts.append('')
        else:
            parts[-1] += piece
    return parts


def lacks_file(text: str, depth: int = 0) -> bool:
    r"""Tell whether commands hold an f. command that is given no file: rTorrent 0.9.8 aborts.

    >>> lacks_file('f.multicall=*,f.path='), lacks_file('branch=d.x=,"d.y=$f.path="')
    (False, True)
    """
    if 'f.' not in text or depth > 20:
        return depth > 20
    for command in split_commands(text, ';\n'):
        command = command.strip()
        head = re.match(r'([$("\s]{0,9})([\w.]{0,99})', command)
        opened, name = head.groups()            # type: ignore[union-attr]
        rest = command[len(opened) + len(name):].lstrip()
        if name.startswith('f.multicall'):
            continue                            # the files are given by it
        if name.startswith('f.') and (rest.startswith('=') or '(' in opened or '$' in opened):
            return True
        for word in split_commands(rest[1:], ','):
            word = word.strip()
            if word.startswith('"'):
                word = re.sub(r'\\(.)', r'\1', word[1:].rstrip('"'))
            is_text = DATA_COMMAND.fullmatch(name) and not word.startswith(('$', '('))
            if not is_text and not word.startswith('{') and lacks_file(word, depth + 1):
                return True
    return False


def refuse_deadly(method: str, params: list) -> None:
    """Refuse f.x(HASH) without a file's index, in any disguise: rTorrent 0.9.8 dies of it."""
    if method == 'system.multicall':
        for entry in params[0] if params else ():
            refuse_deadly(entry['methodName'], list(entry['params']))
    listing = RUNS_TEXT.match(method) and any(
        isinstance(param, str) and lacks_file(param) for param in params)
    bare = method.startswith('f.') and 'multicall' not in method and ':f' not in str(params[:1])
    if listing or bare:
        raise RpcError(f'{method} needs a target HASH:fINDEX; without it rTorrent would abort')


class Method:
    """The name of a command, dots and all; calling it calls the command."""

    def __init__(self, proxy: Proxy, name: str):
        self._proxy, self._name = proxy, name

    def __getattr__(self, name: str) -> Method:
        return Method(self._proxy, f'{self._name}.{name}')

    def __call__(self, *params: Any) -> Any:
        return self._proxy.call(self._name, *params)


class Proxy:
    """Calls rTorrent as xmlrpc.client.ServerProxy does: proxy.d.name(HASH).

    send: request body and content type in, body of the answer out. notice: told after every
    exchange what failed, also that a command is missing, or None. All of it raises RpcError.
    """

    def __init__(self, send: Callable[[bytes, str], bytes], where: str, speaks_json: bool = False,
                 notice: Callable[[RpcError | None], None] = lambda error: None):
        self.send, self.where, self.speaks_json, self.notice = send, where, speaks_json, notice
        self.xml_only: set = set()      # questions whose answer JSON could not carry

    def __getattr__(self, name: str) -> Method:
        if name.startswith('__'):
            raise AttributeError(name)
        return Method(self, name)

    def call(self, method: str, *params: Any) -> Any:
        """Return what one command answers."""
        if method == 'system.multicall':
            return [{'faultCode': value.code, 'faultString': str(value)}
                    if isinstance(value, RpcError) else [value] for value in self.batch(
                        [(entry['methodName'], *entry['params']) for entry in params[0]])]
        value = self.ask([(method, *params)])[0]
        if isinstance(value, RpcError):
            raise type(value)(f'{self.where}: {method}: {value}', value.code)
        return value

    def batch(self, calls: Iterable[tuple]) -> list:
        """Return the answers to many (method, *params) in one round trip, or few if very many.

        In the place of a call that failed is its RpcError.
        """
        calls = list(calls)
        return [answer for start in range(0, len(calls), BATCH)
                for answer in self.ask(calls[start:start + BATCH])]

    def ask(self, calls: list[tuple]) -> list:
        """Return the answers to calls that go out in one request."""
        name = calls[0][0] if len(calls) == 1 else f'a batch from {calls[0][0]} on'
        try:
            for method, *params in calls:
                refuse_deadly(method, params)
            answers = self.exchange(calls)
        except RpcError as error:
            found = type(error)(f'{self.where}: {name}: {error}', error.code)
            self.notice(found)
            raise found from None
        self.notice(next((answer for answer in answers if isinstance(answer, RpcError)
                          and answer.code in MISSING), None))
        return answers

    def exchange(self, calls: list[tuple]) -> list:
        """Return the answers by JSON where it serves, else by XML."""
        question = repr([(method, *params[1:]) for method, *params in calls])
        if self.speaks_json and question not in self.xml_only:
            content = self.send(json_request(calls), 'application/json')
            try:
                return json_reply(content, len(calls))
            except RpcError as error:
                if JSON_NOT_UTF8 not in str(error):
                    raise
                if not all(only_reads(method, params) for method, *params in calls):
                    raise RpcError(f'the commands were run, but their answer is lost: {error}'
                                   ) from None
            if len(self.xml_only) >= 1000:
                self.xml_only.clear()
            self.xml_only.add(question)
        if len(calls) == 1:
            content = self.send(xml_request(calls[0][0], calls[0][1:]), 'text/xml')
            try:
                return [xml_reply(content)]
            except RpcError as error:
                return [error]
        body = xml_request('system.multicall', [[
            {'methodName': method, 'params': params} for method, *params in calls]])
        answers = xml_reply(self.send(body, 'text/xml'))
        if not isinstance(answers, list) or len(answers) != len(calls):
            raise RpcError('system.multicall did not answer every call')
        return [answer[0] if isinstance(answer, list) and answer else rpc_fault(answer)
                for answer in answers]


# --- Engine ----------------------------------------------------------------------------------
# A URL, or rTorrent's own configuration file (the rc), becomes an Engine: one rTorrent. Its
# open() gives a Proxy and looks once at what this rTorrent is and offers, again after a
# restart. It says in the log, once, when its rTorrent is gone and when it is back.

VIEWS = ('default', 'main', 'started', 'stopped', 'complete', 'incomplete', 'seeding',
         'leeching', 'active', 'messages')
GAUGES = {                              # Stats field -> rTorrent command
    'up_rate': 'throttle.global_up.rate', 'up_limit': 'throttle.global_up.max_rate',
    'up_total': 'throttle.global_up.total', 'down_rate': 'throttle.global_down.rate',
    'down_limit': 'throttle.global_down.max_rate', 'down_total': 'throttle.global_down.total',
    'open_sockets': 'network.open_sockets', 'max_open_sockets': 'network.max_open_sockets',
    'open_files': 'network.open_files', 'max_open_files': 'network.max_open_files'}
# One look at rTorrent: uptime and rpc_time in seconds, rates in bytes a second, 0 is no limit;
# views has the size of each. What it does not tell is None.
Stats: Any = collections.namedtuple('Stats', (          # type: ignore[misc]
    'engine_id', 'version', 'uptime', *GAUGES, 'views', 'rpc_time'))
RC_FILES = ('~/.rtorrent.rc', '~/.config/rtorrent/rtorrent.rc')
RC_ADDRESS = ('network.scgi.open_local', 'scgi_local', 'network.scgi.open_port', 'scgi_port')


def process_start(pid: int | None, address: Address) -> float | None:
    """Return when a local rTorrent process was started, in Unix seconds; None if not known."""
    if not pid or not address.is_local():
        return None
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as stat:
            name, _, fields = stat.read().partition('(')[2].rpartition(')')
        if not name.startswith('rtorrent'):             # the pid belongs to a container
            return None
        return time.time() - elapsed_time() + int(fields.split()[19]) / os.sysconf('SC_CLK_TCK')
    except (OSError, ValueError, IndexError):
        return None


def without_errors(answers: list) -> list:
    """Return the answers of Engine.ask() or tell(); raises the first RpcError among them."""
    for answer in answers:
        if isinstance(answer, RpcError):
            raise answer
    return answers


class Engine:
    """One rTorrent; every method raises RpcError when it does not answer as it should.

    But a job that is being made may open() one that is not there yet: its calls fail until it is.
    """
    making = threading.local()          # .jobs is true in the thread that makes them

    def __init__(self, url: str, timeout: float = RPC_TIMEOUT, limit: int = RPC_LIMIT,
                 same_files: bool = False):
        self.address = parse_address(url)
        self.timeout, self.limit, self.same_files = timeout, limit, same_files
        self.log = logging.getLogger('torque.engine')
        self.lock = threading.Lock()            # guards gone_since
        self.proxy: Proxy | None = None
        self.gone_since: float | None = None
        self.stamp: Any = None
        self.pid: int | None = None
        self.methods: frozenset = frozenset()
        self.engine_id, self.session_path, self.cwd, self.versions = '', '', '', ('', '')
        self.said: set[str] = set()             # what is worth a line of the log only once
        self.views: frozenset = frozenset()
        self.aliases: dict[str, list[str]] = {}         # of trackers: name -> beginnings of URLs
        self.startup: float | None = None

    def open(self) -> Proxy:
        """Return a Proxy to call rTorrent with, after a look at what it offers."""
        try:
            return self.reach()
        except Unreachable:
            if not getattr(self.making, 'jobs', False):
                raise
            return Proxy(self.send, self.address.where, False, self.notice)

    def reach(self) -> Proxy:
        """Return the same, also while jobs are made only of an rTorrent that is there."""
        stamp, proxy = None, self.proxy
        with contextlib.suppress(OSError):      # a restarted rTorrent makes a new socket file
            found = os.stat(self.address.path)
            stamp = found.st_ino, found.st_ctime_ns
        if proxy is None or stamp != self.stamp:
            proxy, self.stamp = self.look(), stamp
        return proxy

    def send(self, body: bytes, content_type: str) -> bytes:
        """Carry a request to rTorrent and the body of the answer back."""
        request = http_request if self.address.kind == 'http' else scgi_request
        self.log.log(TRACE, 'to %s: %s', self.address.where, quoted(beginning(body), 400))
        return request(self.address, body, content_type, self.timeout, self.limit)

    def notice(self, error: RpcError | None) -> None:
        """Log that rTorrent has gone, or is back; an error that says so counts as told."""
        with self.lock:
            if error is not None:
                self.proxy = None       # was it restarted or upgraded? look again
            if isinstance(error, Unreachable):
                error.told = True
                if self.gone_since is None:
                    self.gone_since = elapsed_time()
                    self.log.warning('%s', error)
            elif self.gone_since is not None:
                self.log.info('%s answers again, after %s', self.address.where,
                              show_duration(elapsed_time() - self.gone_since))
                self.gone_since = None

    def look(self) -> Proxy:
        """Ask rTorrent who it is and what it offers."""
        proxy = Proxy(self.send, self.address.where, False, self.notice)
        methods = proxy.call('system.listMethods')
        if not isinstance(methods, list) or not all(isinstance(name, str) for name in methods):
            raise RpcError(f'{self.address.where}: system.listMethods: this is no list of '
                           f'commands: {quoted(methods)}')
        names = ('view.list', 'session.name', 'session.path', 'system.client_version',
                 'system.library_version', 'system.pid', 'system.cwd', 'startup_time',
                 'network.rpc.use_jsonrpc')
        answers = proxy.batch((name, '') for name in names)
        known = {name: value for name, value in zip(names, answers)
                 if not isinstance(value, RpcError)}
        self.methods, views = frozenset(methods), known.get('view.list')
        self.views = frozenset(views if isinstance(views, list) else ())
        self.session_path = str(known.get('session.path', ''))
        self.cwd = str(known.get('system.cwd', ''))
        self.engine_id = str(known.get('session.name', self.address.where))
        self.versions = (str(known.get('system.client_version', '?')),
                         str(known.get('system.library_version', '?')))
        self.pid = known.get('system.pid')
        self.startup = known.get('startup_time') or process_start(self.pid, self.address)
        proxy.speaks_json = known.get('network.rpc.use_jsonrpc') == 1
        self.proxy = proxy
        return proxy

    def ask(self, calls: Iterable[tuple]) -> list:
        """Return the answers to many questions, (method, *params) each, in one round trip.

        In the place of one that failed is its RpcError. Questions only: they may be sent twice.
        """
        return self.open().batch(calls)

    def tell(self, calls: Iterable[tuple]) -> list:
        """Return the answers to commands, as ask() does; these are never sent twice."""
        self.open()                     # look first, whether it is there
        return Proxy(self.send, self.address.where, False, self.notice).batch(calls)

    def say_once(self, text: str) -> None:
        """Log a warning about this rTorrent, if it has not been said yet."""
        if text not in self.said:
            self.said.add(text)
            self.log.warning('%s: %s', self.address.where, text)

    def has(self, method: str) -> bool:
        """Tell whether this rTorrent offers a command."""
        self.reach()
        return method in self.methods

    def has_view(self, view: str) -> bool:
        """Tell whether this rTorrent had a view when it was looked at."""
        self.reach()
        return view in self.views

    @property
    def uptime(self) -> float | None:
        """Seconds since rTorrent was started, None where that cannot be known."""
        return None if self.startup is None else max(time.time() - self.startup, 0)

    def stats(self) -> Any:
        """Return rTorrent's figures as Stats, asked in one round trip."""
        proxy = self.open()
        commands = [command for command in GAUGES.values() if command in self.methods]
        began = time.perf_counter()
        answers = proxy.batch([('system.pid', '')] + [(name, '') for name in commands]
                              + [('view.size', '', view) for view in VIEWS])
        rpc_time = time.perf_counter() - began
        pid, *values = (None if isinstance(value, RpcError) else value for value in answers)
        if pid is not None and pid != self.pid:         # it was restarted: look again
            self.look()
        gauges = dict(zip(commands, values))
        return Stats._make([self.engine_id, '/'.join(self.versions), self.uptime,
                            *map(gauges.get, GAUGES.values()),
                            dict(zip(VIEWS, values[len(commands):])), rpc_time])


def split_outside(text: str, mark: str) -> list[str]:
    """Return text split at marks that are outside of quotes and parentheses."""
    parts, depth = [''], 0
    for piece in re.findall(r'"[^"]*"?|[^"]', text):
        depth += {'(': 1, ')': -1, '{': 1, '}': -1}.get(piece, 0)
        if piece == mark and depth <= 0:
            parts.append('')
        else:
            parts[-1] += piece
    return parts


def rc_value(text: str, settings: dict, depth: int = 0) -> str:
    """Return what an rc's value comes to: text, (command,args) or $command=args."""
    text = text.strip()
    if depth > 20:
        raise UserError(f'rtorrent.rc: {text!r} refers to itself; set scgi_url in [TORQUE]')
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        text = text[1:-1]
    if not text.startswith('$') and not (text.startswith('(') and text.endswith(')')):
        return text
    inner = text[1:-1] if text.startswith('(') else text[1:].replace('=', ',', 1)
    name, *args = (part.strip() for part in split_outside(inner, ','))
    values = [rc_value(arg, settings, depth + 1) for arg in args]
    if name == 'cat':
        return ''.join(values)
    if name == 'system.env':
        return os.environ.get(values[0] if values else '', '')
    if name in settings:
        value = rc_value(settings[name], settings, depth + 1)
        return os.path.join(os.path.expanduser(value), '') if name == 'session.path' else value
    raise UserError(f'the address in rtorrent.rc needs rTorrent to work out {name!r}; '
                    'set scgi_url in [TORQUE]')


def read_rc(path: str, settings: dict, depth: int = 0) -> None:
    """Add the commands of an rc and of the files it imports to settings; later ones win."""
    try:
        with open(path, encoding='utf-8', errors='replace') as stream:
            text = stream.read().replace('\\\n', ' ')
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; set scgi_url in [TORQUE]') from None
    for line in text.splitlines():
        if line.lstrip().startswith('#'):
            continue
        for command in split_outside(line, ';'):
            key, equals, value = (part.strip() for part in command.partition('='))
            if not equals:
                continue
            if key in ('import', 'try_import') and depth < 10:
                forgiven = [UserError] if key == 'try_import' else []
                with contextlib.suppress(*forgiven):
                    target = os.path.expanduser(rc_value(value, settings))
                    target = os.path.join(os.path.dirname(path), target)
                    read_rc(target, settings, depth + 1)
            elif key == 'method.insert':
                name, *rest = split_outside(value, ',')
                if len(rest) > 1:
                    settings[name.strip()] = rest[-1].strip()
            else:
                settings['session.path' if key == 'session' else re.sub(r'\.set$', '', key)] = value


def find_url(rc_file: str | None) -> str:
    """Return the scgi_url that rTorrent's own configuration gives.

    rc_file None: the first of RC_FILES that exists. Raises UserError naming what was read.
    """
    for name in [rc_file] if rc_file else RC_FILES:
        path = os.path.expanduser(os.path.expandvars(name))
        if not os.path.isfile(path):
            continue
        settings: dict = {}
        read_rc(path, settings)
        for key in RC_ADDRESS:
            if key in settings:
                url = rc_value(settings[key], settings)
                return os.path.expanduser(url) if key.endswith('local') else 'scgi://' + url
        raise UserError(f'{path} opens no SCGI port or socket (network.scgi.open_local); '
                        'set scgi_url in [TORQUE]')
    raise UserError('is not set in [TORQUE], and there is no '
                    f"{rc_file or ' or '.join(RC_FILES)} (rtorrent_rc) to take it from; "
                    '-D scgi_url=ADDRESS sets it for once')


# --- Files -----------------------------------------------------------------------------------
# A path enters, a fact about the disk leaves. What a path leads to is known by its identity,
# (st_dev, st_ino): bind mounts, links and letters of another case do not change that, while the
# path itself is only a text. Files are written and copied whole or not at all. No threads.

Identity = Tuple[int, int]              # st_dev, st_ino
# By these a system says that there is no such file, whatever else may be wrong.
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
COPIED_AT_ONCE = 1 << 20                # bytes
# Some rTorrents show these for other characters: ? for any byte, %XX, a line feed for \r.
DOUBTFUL = re.compile('[?\ufffd\n\ud800-\udfff]|%[0-9A-Fa-f]{2}')


def identity(path: str) -> Identity | None:
    """Return the identity of what a path leads to, None where nothing is there.

    Raises OSError where that cannot be told, as in a folder that may not be read.
    """
    try:
        status = os.stat(path)
    except ValueError:                  # a NUL in it: no file has such a name
        return None
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
    return status.st_dev, status.st_ino


def sync(path: str) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Make one line that names the file of what the system refuses inside."""
    try:
        yield
    except OSError as error:
        raise LoggableError(f'{path} cannot be written: {error.strerror}') from None


def open_own(path: str, flags: int) -> int:
    """Open a private file, but no link; an `opener` of open()."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def open_private(path: str) -> Any:
    """Open a file that only its user may read, for writing; its folder is made if need be."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    return open(path, 'w', encoding='utf-8', opener=open_own)


def replace_file(path: str, text: str) -> None:
    """Write a private file whole or not at all, whatever happens meanwhile."""
    with writing(path):
        with open_private(path + '.new') as stream:
            stream.write(text)
        sync(path + '.new')
        os.replace(path + '.new', path)


def disk_of(path: str) -> tuple[int | None, int | None]:
    """Return the device that holds a path, or would, and its free bytes; None: not known."""
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    try:
        disk = os.statvfs(path)
        return os.stat(path).st_dev, disk.f_bavail * disk.f_frsize
    except (OSError, ValueError):
        return None, None


def same_content(path: str, other: str) -> bool:
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


def give_owner(path: str, status: os.stat_result) -> bool:
    """Give a file or folder the owner of another, and tell whether it has that one now."""
    with contextlib.suppress(OSError):
        os.chown(path, status.st_uid, status.st_gid)
    return os.stat(path).st_uid == status.st_uid


def copy_file(path: str, copy: str) -> None:
    """Make a new file with content, holes, times, mode and owner of another, on the disk."""
    import shutil
    with open(path, 'rb') as source, open(copy, 'xb') as target:
        size, at = os.fstat(source.fileno()).st_size, 0
        target.truncate(size)
        while at < size:
            try:
                at = os.lseek(source.fileno(), at, os.SEEK_DATA)
            except OSError:             # ENXIO: only a hole is left
                break
            end = os.lseek(source.fileno(), at, os.SEEK_HOLE)
            while at < end:
                content = os.pread(source.fileno(), min(end - at, COPIED_AT_ONCE), at)
                if not content:
                    raise LoggableError(f'{quoted(path)} became shorter while it was copied')
                at += os.pwrite(target.fileno(), content, at)
    if not give_owner(copy, os.stat(path)):
        raise LoggableError(f'{quoted(copy)} cannot be given to the owner of {quoted(path)}')
    with contextlib.suppress(OSError):  # not every file system has modes
        shutil.copystat(path, copy)
    sync(copy)


def make_folders(folder: str) -> None:
    """Make a folder and those above it; new ones belong to the owner of the one they lie in."""
    parent = os.path.dirname(folder)
    if not os.path.isdir(folder):
        make_folders(parent)
        os.mkdir(folder)
        give_owner(folder, os.stat(parent))


def make_empty(folder: str) -> str:
    """Make a folder and return it; an empty one that is there already will do."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)
    os.mkdir(folder, 0o700)
    return folder


def discard(folder: str) -> None:
    """Delete a folder of torque's own and all in it."""
    import shutil
    shutil.rmtree(folder, ignore_errors=True)


def rename_new(path: str, new: str) -> None:
    """Give a file or folder another name that nothing has; OSError where something has it."""
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, 'exists: nothing is overwritten', new)
    os.rename(path, new)
    sync(os.path.dirname(new))


def listening_process(path: str) -> int:
    """Return the pid of who listens on a Unix socket, as the kernel knows it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return struct.unpack('3i', credentials)[0]


def rtorrent_process(engine: Engine) -> int | None:
    """Return the pid of rTorrent on this machine, None where that cannot be told.

    Behind a port, the lock in its session folder has to name this host and that process.
    """
    if engine.address.kind == 'unix':
        return listening_process(engine.address.path)
    if not engine.address.is_local():
        return None
    pid, session, cwd = without_errors(engine.ask(
        [('system.pid', ''), ('session.path', ''), ('system.cwd', '')]))
    with open(os.path.join(cwd, session, 'rtorrent.lock'), encoding='utf-8') as stream:
        locked = stream.read(300).strip()
    if locked == f'{socket.gethostname()}:+{pid}':
        return pid
    return None


def why_unseen(engine: Engine) -> str:
    """Return why the paths of an rTorrent may not mean our files; '' where they do.

    Its process has to see the same mounts from the same root. RpcError where it is away.
    """
    if engine.same_files:
        return ''
    try:
        pid = rtorrent_process(engine)
        if not pid:
            return 'it is not known to run on this machine'
        with open(f'/proc/{pid}/comm', encoding='utf-8', errors='replace') as stream:
            if not stream.read().startswith('rtorrent'):
                return f'process {pid}, which listens there, is not rTorrent'
        with open(f'/proc/{pid}/mountinfo', 'rb') as theirs, \
                open('/proc/self/mountinfo', 'rb') as ours:
            if theirs.read() != ours.read():
                return 'it sees other mounts than torque, as in a container'
    except (OSError, ValueError) as error:
        return f'it is not known to run on this machine: {error}'
    return ''


def sees_same_files(engine: Engine) -> bool:
    """Tell whether the paths of an rTorrent mean our files; where not, the log has why, once."""
    why = why_unseen(engine)
    if why:
        engine.say_once(f'where its data lies is not known: {why}; where its paths are those of '
                        'torque, set same_files = yes')
    return not why


def require_same_files(engine: Engine) -> None:
    """Raise LoggableError where the paths of an rTorrent may not mean our files."""
    why = why_unseen(engine)
    if why:
        raise LoggableError(f'the files of rTorrent at {engine.address.where} may not be those of '
                            f'torque: {why}; where you know that they are, set same_files = yes')


# --- Fields and Filter -----------------------------------------------------------------------
# A field is what conditions, templates and jobs know of a torrent: its kind, the raw values that
# it needs, and what makes its value of them. A raw value is what a d. command answers, something
# of the run or of the engine (now, aliases, session, cwd, seen), or the rows of a second question
# ("files", "trackers"), which is asked only for torrents that the cheap conditions have left
# over. A row is a mapping of field name to value. The text of a condition enters, a Filter leaves:
# closures over a row and `now` in Unix seconds. What is not known is None and meets neither a
# condition nor its opposite, so NOT is carried down to the single conditions. Pure functions, for
# any thread, but for the fields that need `seen`: they look at the disk.

SOURCES = {                             # second questions: command, and the columns of its rows
    'files': ('f.multicall', ('f.path=', 'f.size_bytes=')),
    'trackers': ('t.multicall', (
        't.url=',
        't.is_enabled=',
        't.scrape_complete=',
        't.scrape_incomplete=',
        't.failed_time_last=',
        't.success_time_last='))}
TV = re.compile(
    r'^(?P<show>.+?)[._ -]+'
    r'(?:S(?P<season>\d{1,2})(?:E(?P<episode>\d{2,3}))?|\d{1,2}x\d{2}|'
    r'(?P<date>\d{4}[._-]\d{2}[._-]\d{2}))'
    r'(?:[._ -](?P<title>.*))?$', re.I)
MOVIE = re.compile(
    r'^(?P<title>.+?)[._ -]+[\[(]?(?P<year>(?:19|20)\d\d)[\])]?(?:[._ -].*)?$')
TRAITS = {
    'audio': 'flac mp3 ogg opus m4a wav dts ac3 alac wma ape',
    'video': 'avi mkv m4v vob mp4 mpg mpeg m2ts ts ogv wmv webm mov',
    'img': 'jpg jpeg png gif tif bmp svg webp',
    'docs': 'chm pdf cbr cbz odt ods doc docx xls xlsx ppt epub mobi azw3 djvu',
    'misc': 'rar zip tgz gz bz2 xz 7z iso bin'}
ACTIVATION = re.compile(r'R([0-9]{1,15})[^RP]*(?:P([0-9]{1,15})|$)')
TRACKER_HOST = re.compile(r'(?:\w{1,9}://)?(?:[^/@]*@)?(\[[^]/]*\]|[^/:]*)')
SECOND_LEVEL = 'co com net org ac gov edu'.split()


class TorrentField(NamedTuple):
    """A field: the kind that conditions see, and how its value comes from the raw ones."""
    kind: str                           # text bool number size time duration tags files any
    needs: tuple                        # raw values
    value: Callable | None = None       # a function of them in this order; None: the one itself

    @property
    def slow(self) -> bool:
        """Does it cost more than a column of the list?"""
        return not {*SOURCES, 'seen'}.isdisjoint(self.needs)


def data_path(cwd: str, base: str, directory: str, name: str, multi: int, is_open: int) -> str:
    """Return where the data is; the base path of what is not open is old, or empty."""
    if not directory or is_open and base:
        place = base
    elif multi:
        place = directory
    else:
        place = os.path.join(directory, name)
    if not place:
        return ''
    return os.path.join(cwd, place)


def first_number(*values: Any) -> int:
    """Return the first value that is a number above 0; 0 for a time that is not known."""
    for value in values:
        text = str(value)
        if text.isdecimal() and len(text) < 19 and int(text):
            return int(text)
    return 0


def time_started(marks: str, start: float, end: float) -> float | None:
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


def seed_time(marks: str, tm_completed: Any, finished: Any, complete: int, active: int,
              now: float) -> float | None:
    """Return for how long a complete item was seeded; None where that is not known."""
    completed = first_number(tm_completed, finished)
    if not complete or not completed:
        return None
    seconds = time_started(marks, completed, now)
    if seconds is None and active:
        return now - completed
    return seconds


def leech_time(marks: str, tm_started: Any, began: Any, tm_completed: Any, finished: Any,
               now: float) -> float | None:
    """Return for how long an item was downloaded; None where that is not known."""
    started = first_number(tm_started, began)
    end = first_number(tm_completed, finished) or now
    seconds = time_started(marks, 0, end)
    if seconds is None and started:
        return max(end - started, 0)
    return seconds


def time_stopped(marks: str, state: int, changed: int, tm_started: Any, began: Any) -> int:
    """Return when an item was stopped: by its last mark, else by rTorrent, if it ever ran."""
    _, _, last = marks.rpartition('P')
    paused = first_number(last.partition('R')[0])
    if paused or state or not first_number(tm_started, began):
        return paused
    return first_number(changed)


def time_active(last: Any, peers: int, now: float) -> int:
    """Return when an item last had peers."""
    if peers:
        return int(now)
    return first_number(last)


def time_moved(last: Any, up: int, down: int, now: float) -> int:
    """Return when data of an item was last transferred."""
    return time_active(last, up + down, now)


def session_file(folder: str, info_hash: str) -> str:
    """Return the path of the metafile in rTorrent's session folder; nothing without one."""
    if not folder:
        return ''
    return f'{folder}{info_hash}.torrent'


def percent_done(completed: int, size: int) -> float:
    """Return how much of an item is there."""
    if not size:
        return 0.0
    return 100.0 * completed / size


def domain_of(url: str) -> str:
    """Return the registered domain of a tracker's host, or its number."""
    host = TRACKER_HOST.match(url)[1].lower()           # type: ignore[index]
    labels = host.split('.')
    if labels[-1].isdigit() or ':' in host:
        return host
    parts = 2
    country = len(labels) > 2 and len(labels[-1]) == 2
    if country and labels[-2] in SECOND_LEVEL:
        parts = 3                       # as in example.co.uk
    return '.'.join(labels[-parts:])


def tracker_alias(url: str, aliases: dict[str, list[str]]) -> str:
    """Return a tracker's name by [ANNOUNCE], else the domain that its host belongs to.

    >>> tracker_alias('https://tracker.example.co.uk:80/x/announce', {})
    'example.co.uk'
    """
    for alias, beginnings in aliases.items():
        if url.startswith(tuple(beginnings)):
            return alias
    # else the same server with another passkey
    server = '/'.join(url.split('/', 3)[:3]) + '/'
    for alias, beginnings in aliases.items():
        if any((part + '/').startswith(server) for part in beginnings):
            return alias
    return domain_of(url)


def first_tracker(rows: list) -> str:
    """Return the first enabled announce URL."""
    for url, enabled, *_ in rows:
        if enabled and url != 'dht://':
            return url
    return ''


def alias_of(rows: list, aliases: dict[str, list[str]]) -> str:
    """Return the name of the first enabled tracker."""
    return tracker_alias(first_tracker(rows), aliases)


def most_seeders(rows: list) -> int:
    """Return the seeders that the best tracker knows."""
    return max([row[2] for row in rows], default=0)


def most_leechers(rows: list) -> int:
    """Return the leechers that the best tracker knows."""
    return max([row[3] for row in rows], default=0)


def trackers_failed(rows: list) -> int:
    """Return how many enabled trackers have failed since they last answered."""
    number = 0
    for _, enabled, _, _, failed, answered in rows:
        if enabled and failed > answered:
            number += 1
    return number


def file_names(rows: list) -> list[str]:
    """Return the paths of an item's files."""
    return [path for path, _ in rows]


def file_kinds(rows: list, percent: int = 0) -> list[str]:
    """Return the extensions of files that make up at least so many percent of the data.

    The parts .r00, .r01 ... of an archive count as rar.
    """
    sizes: dict[str, int] = collections.Counter()
    for path, size in rows:
        _, ending = os.path.splitext(path)
        kind = ending.lstrip('.').lower()
        if re.fullmatch('r[0-9][0-9]', kind):
            kind = 'rar'
        sizes[kind] += size
    least = percent * sum(sizes.values())
    return sorted(kind for kind, size in sizes.items() if kind and 100 * size >= least)


def name_traits(name: str, kind: str) -> dict[str, str]:
    """Return what a name tells: kind (tv, movie, audio ...), and show, season, title, year."""
    name = name[:255]                   # the patterns are quadratic
    if kind and name.endswith(kind):
        name = os.path.splitext(name)[0]
    sorts = [trait for trait, kinds in TRAITS.items() if kind in kinds.split()]
    if not sorts or sorts[0] in ('video', 'misc'):
        for trait, regex in (('tv', TV), ('movie', MOVIE)):
            match = regex.match(name)
            if match:
                return {'kind': trait, **match.groupdict('')}
    return {'kind': ''.join(sorts)}


def guess_traits(name: str, rows: list) -> list[str]:
    """Return a classification such as ['tv', 'mkv'], empty where nothing is recognised."""
    kind = ''.join(file_kinds(rows, 51))
    sort = name_traits(name, kind)['kind']
    if not sort:
        return []
    return [sort, kind or 'other']


def has_no_data(seen: Any, *raw: Any) -> bool | None:
    """Tell whether an item has no data where it should be; None where that is not known.

    Not known is also what lies in a folder that is missing or empty: its disk may not be mounted.
    """
    path = data_path(*raw)
    if not seen or DOUBTFUL.search(path):
        return None
    try:
        if not os.listdir(os.path.dirname(path)):
            return None
    except (OSError, ValueError):
        return None
    return not os.path.lexists(path)


def seen_path(seen: Any, *raw: Any) -> str | None:
    """Return where data is with all links resolved; None where that is not known."""
    path = data_path(*raw)
    if not seen or DOUBTFUL.search(path) or not os.path.isdir(os.path.dirname(path)):
        return None
    return os.path.realpath(path)


def space_at(seen: Any, *raw: Any) -> int | None:
    """Return the free bytes on the disk that holds the data; None where that is not known."""
    path = seen_path(seen, *raw)
    if path is None:
        return None
    return disk_of(path)[1]


# Fields that are what one d. command answers: field, or field=command where the names differ.
PLAIN_FIELDS = {
    'text': 'hash name message directory throttle=throttle_name metafile=tied_to_file '
            'label=custom1',
    'size': 'size=size_bytes uploaded=up.total downloaded=down.total left=left_bytes '
            'up=up.rate down=down.rate',
    'number': 'fno=size_files prio=priority peers=peers_connected',
    'bool': 'is_open is_active is_complete=complete is_ignored=ignore_commands is_private '
            'is_multi_file is_hashing=hashing',
    'tags': 'views'}
PATH = 'cwd d.base_path d.directory d.name d.is_multi_file d.is_open'
STARTED = 'd.custom=tm_started d.timestamp.started'
COMPLETED = 'd.custom=tm_completed d.timestamp.finished'
MARKS = 'd.custom=activations'
# name: kind, raw values in the order that the function takes them, the function
MADE_FIELDS: dict[str, tuple[str, str, Callable]] = {
    'ratio': ('number', 'd.ratio', lambda ratio: ratio / 1000),
    'tagged': ('tags', 'd.custom=tags', lambda tags: tags.lower().split()),
    'path': ('text', PATH, data_path),
    'realpath': ('text', 'seen ' + PATH, seen_path),
    'is_ghost': ('bool', 'seen ' + PATH, has_no_data),
    'free': ('size', 'seen ' + PATH, space_at),
    'sessionfile': ('text', 'session d.hash', session_file),
    'done': ('number', 'd.completed_bytes d.size_bytes', percent_done),
    'xfer': ('size', 'd.up.rate d.down.rate', operator.add),
    'loaded': ('time', 'd.custom=tm_loaded d.load_date', first_number),
    'started': ('time', STARTED, first_number),
    'completed': ('time', COMPLETED, first_number),
    'stopped': ('time', f'{MARKS} d.state d.state_changed {STARTED}', time_stopped),
    'active': ('time', 'd.custom=last_active d.peers_connected now', time_active),
    'last_xfer': ('time', 'd.custom=last_xfer d.up.rate d.down.rate now', time_moved),
    'leechtime': ('duration', f'{MARKS} {STARTED} {COMPLETED} now', leech_time),
    'seedtime': ('duration', f'{MARKS} {COMPLETED} d.complete d.is_active now', seed_time),
    'tracker': ('text', 'trackers', first_tracker),
    'alias': ('text', 'trackers aliases', alias_of),
    'seeders': ('number', 'trackers', most_seeders),
    'leechers': ('number', 'trackers', most_leechers),
    'trackers_failed': ('number', 'trackers', trackers_failed),
    'files': ('files', 'files', file_names),
    'kind': ('tags', 'files', file_kinds),
    'traits': ('tags', 'd.name files', guess_traits)}


def all_fields() -> dict[str, TorrentField]:
    """Return the table of fields by name."""
    fields = {}
    for kind, words in PLAIN_FIELDS.items():
        for word in words.split():
            name, _, command = word.partition('=')
            fields[name] = TorrentField(kind, ('d.' + (command or name),))
    for name, (kind, needs, value) in MADE_FIELDS.items():
        fields[name] = TorrentField(kind, tuple(needs.split()), value)
    return fields


TORRENT_FIELDS = all_fields()


def torrent_field(name: str) -> TorrentField:
    """Return a field of the table; custom_KEY, kind_N and d_NAME are made as needed."""
    if name in TORRENT_FIELDS:
        return TORRENT_FIELDS[name]
    stem, _, rest = name.partition('_')
    if stem == 'custom' and rest in ('1', '2', '3', '4', '5'):
        return TorrentField('text', (f'd.custom{rest}',))
    if stem == 'custom' and rest:
        key = rest.replace('\\', '\\\\').replace('"', '\\"')
        return TorrentField('text', (f'd.custom="{key}"',))
    if stem == 'kind' and re.fullmatch('[0-9]{1,2}|100', rest):
        return TorrentField('tags', ('files',), functools.partial(file_kinds, percent=int(rest)))
    if stem == 'd' and re.fullmatch(r'[a-z][\w.]*', rest):
        # as a column, what changes something would be done to every torrent
        if not only_reads(f'd.{rest}', ()):
            raise UserError(f'{name}: d.{rest} changes something: it is no field')
        return TorrentField('any', (f'd.{rest}',))
    raise UserError(f'{name!r} is no field of a torrent{nearest(name, TORRENT_FIELDS)}')


AGE_UNITS = {
    'y': 31536000,
    'M': 2592000,
    'w': 604800,
    'd': 86400,
    'h': 3600,
    'i': 60,
    's': 1}
AGE = re.compile('(?:[0-9]{1,6}[A-Za-z]){1,40}')
DATE_FORMS = ('%Y-%m-%d', '%m/%d/%Y', '%d.%m.%Y')
CLOCK_FORMS = ('', 'T%H', 'T%H:%M', 'T%H:%M:%S')
ORDER = {                               # of limit and value, since the limit is known first
    '=': operator.eq,
    '<': operator.gt,
    '<=': operator.ge,
    '>': operator.lt,
    '>=': operator.le}
PLAIN_NUMBER = re.compile(r'-?[0-9]{1,18}(\.[0-9]{1,18})?')
MOST_CHARACTERS, MOST_IN_PATTERN, MOST_STARS, MOST_DEPTH = 4000, 500, 6, 50
# Of a text that comes from elsewhere, a pattern sees so many characters: the interpreter's lock is
# held meanwhile, and a regex of the user may take quadratic time.
MOST_MATCHED = 1000
# A word is a keyword or pieces, some of them quoted. Only where a value begins, /.../ is a
# regex: it may hold quotes and (without < = >) spaces, and keeps its backslashes.
QUOTED = (
    r'((?<![^\s=<>!~,])/(?:(?:\\.|(?!\s(?:OR|NOT|[][])\s)[^/\\<=>])*|\S*)/i?(?=[\s,]|$))'
    r'''|"((?:\\.|[^"\\])*)"|'([^']*)'|\\(.)''')
PIECE = re.compile(QUOTED, re.S)
WORD = re.compile(r'\s*(?:(\[|\]|OR|NOT)(?!\S)|(!)|((?:%s|[^\s"\'\\])+))' % QUOTED, re.S)
CONDITION = re.compile(r'([A-Za-z_][\w.-]{0,99})(<>|<=|>=|!=|==|<|>|=|~)(.*)', re.S)
COMMA = '\0'                            # stands for a comma that is text
CLASS_OR_ESCAPE = re.compile(r'\\.|\[\^?\]?(?:\\.|[^]\\])*\]')
REPEATED_REPEAT = re.compile(r'\((?:[^()]*[*+]|[^()]*\([^()]*[*+][^()]*\))[^()]*\)[*+{]')
GLOB_PIECE = re.compile(r'\*+|\[!?\]?[^]]{0,99}\]|.', re.S)
JOINING_WORDS = ('and', 'or', 'not', '&', '&&', '|', '||', '')


def mistake(what: str, text: str, at: int, why: Any) -> UserError:
    """Return the error that shows a text of the user with a mark at the place."""
    before = ' '.join(text[:at].split())
    after = ' '.join(text[at:].split())
    if len(before) > 90:
        before = '...' + before[-87:]
    if len(after) > 40:
        after = after[:37] + '...'
    shown = f'{before} <-- here {after}'.strip()
    return UserError(f'{what} {quoted(shown, 600)}: {why}')


def glob_regex(glob: str) -> str:
    """Return the regex of a glob, which takes linear time: the first match after a star counts.

    fnmatch has done so from Python 3.9 on.
    """
    parts = ['']
    for piece in GLOB_PIECE.findall(glob):
        if piece.startswith('*'):
            parts.append('')
        else:
            parts[-1] += fnmatch.translate(piece)[4:-3]         # without (?s: and )\Z
    regex = parts[0]
    for number, part in enumerate(parts[1:-1]):
        regex += f'(?=(?P<g{number}>.*?{part}))(?P=g{number})'
    if len(parts) > 1:
        regex += '.*' + parts[-1]
    return regex


def text_pattern(text: str) -> Callable[[str], Any]:
    """Return what finds a /regex/, or matches a glob as a whole; the case does not matter."""
    regex = re.fullmatch('/(.*)/i?', text, re.S)
    stars = 0
    if not regex:
        stars = len(re.findall(r'\*+', text))
    if len(text) > MOST_IN_PATTERN or stars > MOST_STARS or '{{' in text and not regex:
        raise UserError(f'allowed are a /regex/, or a glob of {MOST_STARS} stars, no template')
    if regex and REPEATED_REPEAT.search(CLASS_OR_ESCAPE.sub('x', regex[1])):
        # only the usual slip is caught
        raise UserError('a repeat in a repeated group can take for ever; allowed is e.g. (ab)+, '
                        'not (a+)+')
    try:
        if regex:
            return re.compile(regex[1], re.I).search
        return re.compile(glob_regex(text), re.I | re.S).fullmatch
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise UserError(f'{quoted(text)} is not a regex or glob: {error}') from None


def has_class(text: str) -> bool:
    """Tell whether a value is a glob with a class of characters, as [TGx]* is."""
    if text.lstrip('!:').startswith('/'):
        return False
    _, _, inside = text.partition('[')
    return ']' in inside[1:]


def parse_age(text: str) -> int | None:
    """Return the seconds in an age, None for what is written as something else.

    >>> parse_age('1d12h'), parse_age('1h30m'), parse_age('2024-03-15')
    (129600, 5400, None)
    """
    if not AGE.fullmatch(text):
        return None
    seconds, units = 0, ['']
    for number, unit in re.findall('([0-9]{1,6})([A-Za-z])', text):
        if unit == 'm' and units[-1] in ('w', 'd', 'h'):
            unit = 'i'                  # after these it is no month
        elif unit == 'm':
            raise UserError('m is months to pyrocore and minutes to pyrosimple; '
                            'allowed are M for months and i for minutes')
        elif unit != 'M':
            unit = unit.lower()
        if unit not in AGE_UNITS or unit in units:
            raise UserError(f'{quoted(text)} is not an age; allowed are y M w d h i s, each once')
        seconds += int(number) * AGE_UNITS[unit]
        units.append(unit)
    return seconds


def parse_time(text: str) -> float:
    """Return the Unix seconds of a local date, or of Unix seconds.

    A number below 10^8 (1973) is an age that lost its unit.
    """
    if re.fullmatch('0|[1-9][0-9]{8,11}', text):
        return int(text)
    spelt = text.upper().replace(' ', 'T')
    for day in DATE_FORMS:
        for clock in CLOCK_FORMS:
            with contextlib.suppress(ValueError, OverflowError):
                return time.mktime(time.strptime(spelt, day + clock))
    raise UserError(f'{quoted(text)} is not a time; allowed are e.g. 2w 1d12h 2024-03-15 '
                    '03/15/2024 15.03.2024T14:50, Unix seconds')


# What a condition does with a value of a row, which comes last.

def number_fits(order: Callable, limit: float, value: Any) -> bool:
    """Compare what may be a number."""
    if not PLAIN_NUMBER.fullmatch(str(value)[:40]):
        return False
    return order(limit, float(value))


def is_truth(wanted: bool, value: Any) -> bool:
    """Tell whether a value is as true as it should be."""
    return bool(value) is wanted


def is_like(matches: Callable, text: str, value: Any) -> bool:
    """Tell whether a text matches; [x] as it stands is meant, too."""
    shown = str(value)[:MOST_MATCHED]
    return matches(shown) is not None or shown.lower() == text


def has_like(matches: Callable, text: str, value: list) -> bool:
    """Tell whether one of several texts matches."""
    return any(is_like(matches, text, part) for part in value)


def has_only_like(matches: Callable, text: str, value: list) -> bool:
    """Tell whether there are texts, and all of them match."""
    if not value:
        return False
    return all(is_like(matches, text, part) for part in value)


def order_test(kind: str, op: str, text: str) -> Callable[[Any], bool]:
    """Return the test of a number, size, duration, time or, where the text is one, age."""
    if op == '=' and text.startswith('+'):
        op, text = '>', text[1:]
    elif op == '=' and text.startswith('-'):
        op, text = '<', text[1:]
    order = ORDER[op]
    plain = PLAIN_NUMBER.fullmatch(text)
    if len(text) > 40 or kind in ('number', 'any') and not plain:
        raise UserError(f'{quoted(text)} is not a number; allowed are e.g. 2 and 1.5')
    if kind == 'any':
        return functools.partial(number_fits, order, float(text))
    if kind == 'number':
        return functools.partial(order, float(text))
    if kind == 'size':
        return functools.partial(order, parse_size(text))
    limit: float | None = parse_age(text)
    if op == '=' and not text.isdigit():
        raise UserError(f'{quoted(text)} does not go with =; allowed are < <= > >= =+ =-')
    if limit is None and kind == 'time':
        limit = parse_time(text)
    elif limit is None and text != '0':
        raise UserError(f'{quoted(text)} is not a length of time; allowed are e.g. 8w 1d12h')
    return functools.partial(order, limit or 0)


def is_ordered(kind: str, op: str, text: str) -> bool:
    """Tell whether a condition compares numbers; what d_NAME answers may be one, or text."""
    if kind == 'any':
        signed = text.startswith(('+', '-'))
        return op != '=' or signed and PLAIN_NUMBER.fullmatch(text[1:]) is not None
    return kind in ('number', 'size', 'time', 'duration')


def value_test(kind: str, op: str, text: str) -> Callable[[Any], bool]:
    """Return the test of one value of a condition."""
    if is_ordered(kind, op, text):
        return order_test(kind, op, text)
    if op != '=':
        raise UserError(f'{op} does not go with {kind}; allowed are = and !=')
    if kind == 'bool':
        return functools.partial(is_truth, parse_bool(text))
    if kind == 'any' and text.lower() in ('yes', 'no', 'true', 'false'):
        raise UserError(f'{text!r} is nothing that a command answers; allowed are 1 and 0')
    test = is_like
    if kind in ('tags', 'files') and text in ('', ':'):
        return operator.not_
    if kind == 'tags' and text.startswith(':'):
        test, text = has_only_like, text[1:]
    elif kind in ('tags', 'files'):
        test = has_like
    return functools.partial(test, text_pattern(text), text.lower())


class Node(NamedTuple):
    """Conditions joined, and how many of them need a second question.

    test(row, now, possible): with `possible`, what the row lacks is taken to hold.
    """
    test: Callable
    cost: int


def leaf(name: str, field: TorrentField, op: str, text: str, negated: bool) -> Node:
    """Return one condition: False for an unknown value, also when it is negated."""
    if op == '=' and text.startswith('!'):              # negates, as in pyrocore
        negated, text = not negated, text[1:]
    test = value_test(field.kind, op, text)
    counts_back = field.kind == 'time' and parse_age(text.lstrip('+-')) is not None
    unknown: tuple = (None,)
    if field.kind == 'time' and text.lstrip('+-') != '0':
        unknown = (None, 0)

    def holds(row: Mapping, now: float, possible: bool) -> bool:
        value: Any = row.get(name)
        if value in unknown:
            return possible and name not in row
        if counts_back:
            value = now - value
        return test(value) is not negated
    return Node(holds, int(field.slow))


def joined(nodes: list[Node], every: bool) -> Node:
    """Return the Node of all or any of some, the cheap ones first."""
    if len(nodes) == 1:
        return nodes[0]
    nodes = sorted(nodes, key=operator.attrgetter('cost'))
    tests = [node.test for node in nodes]

    def holds(row: Mapping, now: float, possible: bool) -> bool:
        for test in tests:
            if test(row, now, possible) is not every:
                return not every
        return every
    return Node(holds, sum(node.cost for node in nodes))


def unquoted(piece: re.Match) -> str:
    """Return a piece of a word as what it stands for; a comma in it parts no values."""
    regex, double, single, escaped = piece.groups()
    text = regex or single or escaped or re.sub(r'\\(["\\])', r'\1', double or '')
    return text.replace(',', COMMA)


def is_no_name(text: str) -> bool:
    """Tell whether a word alone cannot be meant as the name of a torrent."""
    if text in TORRENT_FIELDS or text.lower().strip('[]') in JOINING_WORDS:
        return True
    if text.startswith('/'):
        return False
    return re.search('[=<>]', text) is not None


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
        self.key, self.word = '', ''    # the word in hand: a keyword, or a condition
        self.needs: dict[str, TorrentField] = {}
        self.classes: list[str] = []
        try:
            self.read_word()
            self.root = self.expression(False, 0)
        except UserError as error:
            raise mistake('condition', text, self.at, error) from None
        self.fields = tuple(self.needs)

    def match(self, row: Mapping, now: float | None = None) -> bool:
        """Tell whether a row meets the condition; ages count back from `now`."""
        if now is None:
            now = time.time()
        return self.root.test(row, now, False)

    def cheap(self, row: Mapping, now: float) -> bool:
        """Tell whether a row may meet the condition once it has the fields that it lacks."""
        return self.root.test(row, now, True)

    def read_word(self) -> None:
        """Take the next word in hand."""
        if len(self.text) > MOST_CHARACTERS or COMMA in self.text:
            raise UserError(f'this is too long, or holds a NUL; allowed are {MOST_CHARACTERS} '
                            'characters')
        self.key, self.word = 'END', ''
        if not self.text[self.at:].strip():
            return
        word = WORD.match(self.text, self.at)
        if not word:
            raise UserError('after this, a quote has no other half')
        self.at = word.end()
        self.key = word[1] or ''
        if word[2]:
            self.key = 'NOT'
        self.word = PIECE.sub(unquoted, word[3] or '')

    def expression(self, negated: bool, depth: int) -> Node:
        """expr ::= term ( 'OR' term )*"""
        if depth > MOST_DEPTH:
            raise UserError(f'brackets are nested too deep; allowed are {MOST_DEPTH}')
        terms = [self.term(negated, depth)]
        while self.key == 'OR':
            self.read_word()
            terms.append(self.term(negated, depth))
        if (self.key == ']') is not (depth > 0):
            raise UserError('a bracket without its other half; [ and ] stand between spaces')
        return joined(terms, negated)                   # neither a nor b: not a, and not b

    def term(self, negated: bool, depth: int) -> Node:
        """term ::= factor+"""
        factors = [self.factor(negated, depth)]
        while self.key not in ('OR', ']', 'END'):
            factors.append(self.factor(negated, depth))
        return joined(factors, not negated)

    def factor(self, negated: bool, depth: int) -> Node:
        """factor ::= ( 'NOT' | '!' ) factor | '[' expr ']' | condition"""
        while self.key == 'NOT':
            negated = not negated
            self.read_word()
        if self.key == '[':
            self.read_word()
            node = self.expression(negated, depth + 1)
        elif self.key:
            raise UserError('a condition is missing; allowed are e.g. ratio>2 *name* [ ... ]')
        else:
            node = self.condition(negated)
        self.read_word()
        return node

    def condition(self, negated: bool) -> Node:
        """condition ::= field op value | value;  value may be several, with commas"""
        name, op, value = 'name', '=', self.word
        match = CONDITION.fullmatch(self.word)
        if match:
            name, op, value = match.groups()
        elif is_no_name(self.word):
            raise UserError('this is no condition; allowed are field=value without spaces, a glob, '
                            'NOT, OR, [ ... ] between spaces; side by side means and')
        field = self.needs[name] = torrent_field(name)
        if op in ('!=', '<>'):
            negated = not negated
        if op == '~':                                   # as in pyrocore
            value = f'/{value}/'.replace(',', COMMA)
        elif op == '==' and field.kind == 'tags':       # this one and no other
            value = ':' + value
        if op in ('==', '!=', '<>', '~'):
            op = '='
        values = [value]
        if op == '=':
            values = value.split(',')
        if '' in values and len(values) > 1:
            raise UserError('a value is missing beside a comma')
        nodes = []
        for part in values:
            part = part.replace(COMMA, ',')
            if has_class(part):
                self.classes.append(f'{name}{op}{part}')
            nodes.append(leaf(name, field, op, part, negated))
        return joined(nodes, negated)


# --- Torrents --------------------------------------------------------------------------------
# A view, names of fields and a Filter enter, rows leave: a Torrent maps a field's name to its
# value. One round trip brings the columns of all torrents; one more each brings "files" and
# "trackers" of those that are left. The bytes of a .torrent file enter, a Metafile leaves; they
# are read where they lie, so that no metafile takes more than a few times its size. Any thread.

class Torrent(dict):
    """One row: torrent.size or torrent['size']; `hash` and `name` are always there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f'the field {name!r} was not asked for') from None

    def __str__(self) -> str:
        return f"{quoted(self['name'])} {self['hash']}"


def fetch_columns(engine: Engine, view: str, needs: Iterable[str]) -> dict[str, list]:
    """Return what the d. commands in `needs` answer for all torrents of a view, by command."""
    commands = [need for need in dict.fromkeys(needs) if need.startswith('d.')]
    columns = []
    for command in commands:
        if '=' not in command:
            command += '='
        columns.append(command)
    listing = ('d.multicall2', '', view, *columns)
    rows, size = engine.ask([listing, ('view.size', '', view)])
    for answer in (rows, size):
        if isinstance(answer, RpcError):
            raise RpcError(f'{engine.address.where}: view {view!r}: {answer}', answer.code)
    # Half a list must not pass for the whole: what is not listed would count as gone.
    if not isinstance(rows, list) or any(
            not isinstance(row, list) or len(row) != len(columns) for row in rows):
        rows = []
    if len(rows) != size:
        raise RpcError(f'{engine.address.where}: only {len(rows)} of the {size!r} items '
                       f'of view {view!r} were listed')
    return {command: [row[at] for row in rows] for at, command in enumerate(commands)}


class Listing:
    """Torrents in the making: rows, and the raw values of each, which are dropped together."""

    def __init__(self, engine: Engine, columns: dict[str, list], now: float):
        self.engine, self.raw = engine, columns
        self.rows = [Torrent() for _ in columns['d.hash']]
        self.constants = {
            'now': now,
            'aliases': engine.aliases,
            'session': engine.session_path,
            'cwd': engine.cwd}

    def keep(self, wanted: list[bool]) -> None:
        """Drop the others."""
        self.rows = list(itertools.compress(self.rows, wanted))
        for need, values in self.raw.items():
            self.raw[need] = list(itertools.compress(values, wanted))

    def ask(self, source: str) -> None:
        """Ask the second question; torrents that have gone meanwhile are dropped."""
        method, cells = SOURCES[source]
        calls = [(method, item, '', *cells) for item in self.raw['d.hash']]
        answers = self.engine.ask(calls)
        # An item that was erased since the list was made is no error; anything else is.
        self.raw[source] = answers
        self.keep([not isinstance(rows, HashNotFound) for rows in answers])
        without_errors(self.raw[source])

    def add(self, name: str, field: TorrentField) -> None:
        """Work out a field of all rows."""
        columns: list = []
        for need in field.needs:
            # Whether torque sees rTorrent's files costs a question: only who needs it asks.
            if need == 'seen' and need not in self.constants:
                self.constants[need] = sees_same_files(self.engine)
            if need in self.constants:
                columns.append(itertools.repeat(self.constants[need]))
            else:
                columns.append(self.raw[need])
        values = columns[0]
        if field.value:
            values = map(field.value, *columns)
        for row, value in zip(self.rows, values):
            row[name] = value


def list_torrents(engine: Engine, view: str, names: Iterable[str],
                  condition: Filter | None = None) -> list[Torrent]:
    """Return the torrents of a view that meet a Filter, with hash, name and the given fields.

    One round trip, and one more for each second question. Raises RpcError, also when the list is
    shorter than the view: half a list must not pass for the whole.
    """
    now = time.time()
    tested: tuple = ()
    if condition:
        tested = condition.fields
    fields = {}
    commands: list[str] = []
    for name in ('hash', 'name', *tested, *names):
        fields[name] = torrent_field(name)
        commands += fields[name].needs
    columns = fetch_columns(engine, view, commands)
    listing = Listing(engine, columns, now)
    for name in tested:
        if not fields[name].slow:
            listing.add(name, fields.pop(name))
    if condition:
        listing.keep([condition.cheap(row, now) for row in listing.rows])
    # The second questions cost a call for each torrent, so only those that are left are asked.
    for source in SOURCES:
        if any(source in field.needs for field in fields.values()):
            listing.ask(source)
    for name, field in fields.items():
        listing.add(name, field)
    if condition and not fields.keys().isdisjoint(tested):
        return [row for row in listing.rows if condition.match(row, now)]
    return listing.rows


# A hostile metafile of 57 MB, all empty lists, took 2.2 GiB as Python's objects. So values are
# skipped where they lie, and only those that somebody needs are built.
BENCODED = re.compile(rb'i(0|-?[1-9][0-9]{0,18})e|(0|[1-9][0-9]{0,9}):')
AFTER_HEAD = {b'l': 'l', b'd': 'k'}
AFTER_VALUE = {'l': 'l', 'k': 'v', 'v': 'k'}
UNUSABLE_NAME = re.compile(rb'\.{0,2}|.*[/\0].*', re.S)
METAFILE_LIMIT = 16 << 20               # bytes
MOST_IN_ENTRY = 1 << 16                 # bytes of what a metafile says of one file


def bencoded_end(content: bytes, at: int) -> int:
    """Return where the bencoded value that begins there ends; ValueError if it does not.

    Nothing is built. What follows the value is ignored, as rTorrent ignores it.
    """
    inside = ['']                       # l in a list, k before a key of a dictionary, v after it
    while True:
        token = BENCODED.match(content, at)
        head = content[at:at + 1]
        state = inside[-1]
        if token and (token[2] or state != 'k'):
            at = token.end() + int(token[2] or 0)
        elif head == b'e' and state in ('l', 'k'):
            inside.pop()
            at += 1
        elif head in AFTER_HEAD and state != 'k' and len(inside) <= MOST_DEPTH:
            inside.append(AFTER_HEAD[head])
            at += 1
            continue
        else:
            raise ValueError(f'not bencoded at byte {at}')
        if at > len(content):
            raise ValueError(f'not bencoded: it ends before byte {at}')
        if len(inside) == 1:
            return at
        inside[-1] = AFTER_VALUE[inside[-1]]


def bencoded_items(content: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Give (start, end) of what is in a list."""
    at += 1
    while content[at:at + 1] != b'e':
        end = bencoded_end(content, at)
        yield at, end
        at = end


def bencoded_members(content: bytes, at: int) -> Iterator[tuple[bytes, int, int]]:
    """Give (key, start, end) of each value of a dictionary."""
    at += 1
    while content[at:at + 1] != b'e':
        key = BENCODED.match(content, at)
        if not key or not key[2]:
            raise ValueError(f'not bencoded at byte {at}')
        start = key.end() + int(key[2])
        at = bencoded_end(content, start)
        yield content[key.end():start], start, at


def scalar_at(content: bytes, at: int) -> Any:
    """Return a text or a number, None for a list or a dictionary."""
    token = BENCODED.match(content, at)
    if not token:
        return None
    if token[1]:
        return int(token[1])
    start = token.end()
    return content[start:start + int(token[2])]


def bdecode(content: bytes, at: int = 0) -> Any:
    """Return a value that lies whole in there; text stays bytes.

    >>> bdecode(b'd4:name1:ae')
    {b'name': b'a'}
    """
    head = content[at:at + 1]
    if head == b'l':
        return [bdecode(content, start) for start, _ in bencoded_items(content, at)]
    if head == b'd':
        members = bencoded_members(content, at)
        return {key: bdecode(content, start) for key, start, _ in members}
    return scalar_at(content, at)


class Metafile(NamedTuple):
    """What a .torrent file says."""
    content: bytes
    info_hash: str
    name: str                           # bytes that are no UTF-8 are surrogates in it
    tracker: str
    files_at: int | None                # where the list of files begins; None: a single file

    def files(self) -> Iterator[Any]:
        """Give what it says of each file of several: b'path' and b'length', if it is in order."""
        if self.files_at is not None:
            for start, end in bencoded_items(self.content, self.files_at):
                if end - start > MOST_IN_ENTRY:
                    raise ValueError(f'a file that takes {end - start} bytes to describe')
                yield bdecode(self.content, start)

    @property
    def main_file(self) -> str:
        """Return the name of the largest file."""
        largest, most = self.name, -1
        for entry in self.files():
            with contextlib.suppress(KeyError, TypeError, IndexError, ValueError):
                length = entry[b'length']
                if length > most:
                    largest, most = text_of(entry[b'path'][-1]), length
        return largest


def text_of(content: Any) -> str:
    """Return bytes as text; nothing for anything else."""
    if not isinstance(content, bytes):
        return ''
    return content.decode('utf-8', 'surrogateescape')


def parse_metafile(content: bytes) -> Metafile:
    """Return what the bytes of a metafile say; ValueError when they are none, or not whole."""
    import hashlib
    info_at, info_end, tracker = 0, 0, None
    if not content.startswith(b'd'):
        bencoded_end(content, 0)
        raise ValueError('no `info` in it')
    for key, start, end in bencoded_members(content, 0):
        if key == b'announce':
            tracker = scalar_at(content, start)
        elif key == b'info' and content[start:start + 1] == b'd':
            info_at, info_end = start, end
    if not info_at:
        raise ValueError('no `info` in it')
    files_at, last = None, b''
    facts = {}
    for key, start, _ in bencoded_members(content, info_at):
        # rTorrent writes them in order, and the info-hash would be another one.
        if key < last:
            raise ValueError('the keys of `info` are not in order')
        last = key
        if key in (b'name', b'length', b'pieces'):
            facts[key] = scalar_at(content, start)
        elif key == b'files' and content[start:start + 1] == b'l':
            files_at = start
    # The name becomes a file or folder, so it has to be one name.
    name, pieces = facts.get(b'name'), facts.get(b'pieces')
    if not isinstance(name, bytes) or UNUSABLE_NAME.fullmatch(name):
        raise ValueError('no usable `name` in it')
    if not isinstance(pieces, bytes) or not pieces or len(pieces) % 20:
        raise ValueError('no pieces, or no length in it')
    if files_at is None and not isinstance(facts.get(b'length'), int):
        raise ValueError('no pieces, or no length in it')
    info = memoryview(content)[info_at:info_end]
    info_hash = hashlib.sha1(info).hexdigest().upper()
    return Metafile(content, info_hash, text_of(name), text_of(tracker), files_at)


def read_metafile(path: str) -> Metafile:
    """Return a metafile; raises ValueError when it is none, not whole, or too large."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):                # a named pipe would block for ever
        raise ValueError('no regular file')
    if not status.st_size:
        raise ValueError('empty')
    if status.st_size > METAFILE_LIMIT:
        raise ValueError(f'larger than {show_size(METAFILE_LIMIT)}')
    with open(path, 'rb') as stream:
        return parse_metafile(stream.read(status.st_size))


# --- Data ------------------------------------------------------------------------------------
# Whose data is it? An Item of rTorrent enters; what leaves is its OwnData, proven to be its own,
# or a LoggableError that says why not: every doubt keeps the data. A Removal is a note in
# state_dir, on the disk before anything changes: it carries a removal out, and a later run
# finishes what a crash has left. Notes are locked by who handles them, so other threads and
# processes may remove something else at the same time. An owner is (address of rTorrent, hash).

# What of a name any rTorrent shows as it is; see DOUBTFUL.
NOT_PLAIN = re.compile('%[0-9A-Fa-f]{2}|[^ -~]|[?%]')
NOTE = 'removal.'                       # names of notes begin so


class ItemFile(NamedTuple):
    """A file as rTorrent tells of it; each field is an f. command."""
    path: str
    frozen_path: str                    # where rTorrent has opened it
    size_bytes: int
    completed_chunks: int
    size_chunks: int
    is_created: int                     # does rTorrent find a file there, right now?


class Item(NamedTuple):
    """An item as rTorrent tells of it at one moment; each field up to `files` is a d. command."""
    hash: str
    name: str
    is_open: int
    state: int
    hashing: int
    base_path: str
    directory: str
    directory_base: str
    is_multi_file: int
    completed_bytes: int
    timestamp_started: int
    files: list[ItemFile]
    cwd: str                            # where relative paths start from
    default_folder: str                 # where items are put when nothing else is said
    session: str                        # folder of the session
    engine: Engine

    @property
    def owner(self) -> tuple[str, str]:
        return self.engine.address.where, self.hash

    def absolute(self, path: str) -> str:
        """Return what a path of rTorrent is from anywhere."""
        return os.path.join(self.cwd, path)

    def tell(self, *commands: tuple) -> None:
        """Have rTorrent do commands, without the hash in them, with the item."""
        without_errors(self.engine.tell(
            [(name, self.hash, *params) for name, *params in commands]))


class OwnFile(NamedTuple):
    """A file that is proven to be an item's own."""
    path: str
    device: int
    inode: int


class OwnData(NamedTuple):
    """What an item has on the disk."""
    root: str                           # its folder, or its only file
    files: list[OwnFile]
    folders: list[str]                  # they go when they are empty; the deepest first


def ask_item(engine: Engine, info_hash: str) -> Item:
    """Return an item as it is now; raises HashNotFound where there is none."""
    fields = Item._fields[:Item._fields.index('files')]
    calls: list[tuple] = [
        ('d.' + name.replace('timestamp_', 'timestamp.'), info_hash) for name in fields]
    columns = [f'f.{name}=' for name in ItemFile._fields]
    calls.append(('f.multicall', info_hash, '', *columns))
    calls += [(name, '') for name in ('system.cwd', 'directory.default', 'session.path')]
    *facts, rows, cwd, default, session = without_errors(engine.ask(calls))
    files = [ItemFile(*row) for row in rows]
    return Item(*facts, files, cwd, default, session, engine)


@contextlib.contextmanager
def opened(engine: Engine, info_hash: str) -> Iterator[tuple[Item, bool]]:
    """Give an item that rTorrent has open, and whether it was closed before.

    Base paths of a closed item are old, or empty: it is opened, and afterwards closed again.
    """
    item = ask_item(engine, info_hash)
    if item.hashing:
        raise LoggableError('it is being checked')
    if item.is_open:
        yield item, False
        return
    try:
        item.tell(('d.open',))
        yield ask_item(engine, info_hash), True
    finally:
        with contextlib.suppress(RpcError):     # it may be erased by now
            item.tell(('d.close',))


def start_again(item: Item) -> None:
    """Bring an item to the state that it had when it was asked for."""
    if item.state:
        # In one request, for a crash between them would leave it stopped. d.start alone does
        # nothing where d.state is 1 already.
        item.tell(('d.open',), ('d.stop',), ('d.start',))
    elif item.is_open:
        item.tell(('d.open',))
    else:
        item.tell(('d.close',))


def erase(item: Item) -> None:
    """Erase an item from rTorrent; raises RpcError where that has not happened for sure."""
    commands = [(name, item.hash) for name in ('d.stop', 'd.close', 'd.erase')]
    try:
        erased = item.engine.tell(commands)[-1]
    except Unreachable as error:
        # An answer that never came is no answer, neither yes nor no.
        there, = item.engine.ask([('d.hash', item.hash)])
        if isinstance(there, HashNotFound):
            return
        raise Unreachable(f'{error}; it is still there') from None
    without_errors([erased])


def plain_parts(names: Iterable[str]) -> list[str]:
    r"""Return what of names comes through every rTorrent as it is.

    >>> plain_parts(['caf\xe9 1.bin']) == plain_parts(['caf? 1.bin'])
    True
    """
    return [NOT_PLAIN.sub('', name) for name in names]


def names_of_metafile(path: str, info_hash: str) -> tuple[str, list[str]]:
    """Return the true name of an item and the paths of its files, as its metafile has them.

    Bytes that are no UTF-8 are surrogates. Raises LoggableError without the right metafile.
    """
    try:
        meta = read_metafile(path)
        if meta.info_hash != info_hash:
            raise ValueError('it is that of another item')
        paths = []
        for entry in meta.files():
            if entry.get(b'path.utf-8', entry[b'path']) != entry[b'path']:
                raise ValueError('a file has two names in it')
            paths.append(os.fsdecode(b'/'.join(entry[b'path'])))
        return meta.name, paths or [meta.name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoggableError('its name came through badly, and its metafile in the session '
                            f'folder does not tell the true one: {error_text(error)}') from None


def true_paths(item: Item) -> tuple[str, list[str]]:
    """Return where the data of an open item is, and the names of its files in there."""
    for file in item.files:
        expected = item.base_path
        if item.is_multi_file:
            expected += '/' + file.path
        if not item.base_path or file.frozen_path != expected:
            raise LoggableError(f'rTorrent has {quoted(file.frozen_path)} open, and not what '
                                f'lies at {quoted(item.base_path)}')
    root, shown = item.absolute(item.base_path), [file.path for file in item.files]
    if not any(map(DOUBTFUL.search, [root, *shown])):
        return root, shown
    metafile = item.absolute(f'{item.session}/{item.hash}.torrent')
    name, names = names_of_metafile(metafile, item.hash)
    folder, last = os.path.split(root)
    if plain_parts([last]) == plain_parts([name]):
        last = name
    true_root = os.path.join(folder, last)
    # Surrogates are right in a name that the metafile tells, but not in what rTorrent told.
    doubtful = DOUBTFUL.search(folder) or last != name and DOUBTFUL.search(last)
    if doubtful or plain_parts(shown) != plain_parts(names):
        raise LoggableError(f'its path {quoted(root)} came through badly')
    return true_root, names


def check_file(path: str, file: ItemFile) -> OwnFile | None:
    """Return a file of an item, None where it is not there; LoggableError where in doubt."""
    try:
        status = os.lstat(path)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise LoggableError(f'{quoted(path)}: {error.strerror}') from None
        if file.is_created:
            raise LoggableError(f'rTorrent sees {quoted(path)}, and torque does not') from None
        return None
    if not file.is_created:
        raise LoggableError(f'torque sees {quoted(path)}, and rTorrent does not')
    if not stat.S_ISREG(status.st_mode):
        raise LoggableError(f'{quoted(path)} is a link, or no file')
    is_whole = file.completed_chunks == file.size_chunks > 0
    if is_whole and status.st_size != file.size_bytes:
        raise LoggableError(f'{quoted(path)} has {status.st_size} bytes instead of the '
                            f'{file.size_bytes} that it is complete with')
    return OwnFile(path, status.st_dev, status.st_ino)


def folders_up_to(root: str, paths: Iterable[str]) -> list[str]:
    """Return the folders that files are in, up to `root`; the deepest first."""
    found = {root}
    for path in paths:
        folder = os.path.dirname(path)
        while folder not in found:
            found.add(folder)
            folder = os.path.dirname(folder)
    return sorted(found, key=len, reverse=True)


def own_data(item: Item, fresh: bool) -> OwnData:
    """Return what an open item has on the disk, proven to be its own; else LoggableError.

    fresh: it was not open before.
    """
    if not item.is_open:
        raise LoggableError('rTorrent cannot open it')
    require_same_files(item.engine)
    root, names = true_paths(item)
    paths, folders = [root], []
    if item.is_multi_file:
        paths = [f'{root}/{name}' for name in names]
        folders = folders_up_to(root, paths)
    for folder in folders:
        if os.path.islink(folder) or os.path.basename(folder) == '..':
            raise LoggableError(f'{quoted(folder)} is a link, or leads out of it')
    files = [check_file(path, file) for path, file in zip(paths, item.files)]
    own = [file for file in files if file]
    # A user's file may lie where an item that has nothing yet would have its own.
    begun = item.timestamp_started and not fresh
    if own and not item.completed_bytes and not begun:
        raise LoggableError(f'{quoted(root)} may not be its own: rTorrent has no piece of it')
    # Other downloads may come to lie in a folder that is not named after this one.
    common = [identity(item.absolute(path)) for path in ('', item.default_folder)]
    named = plain_parts([os.path.basename(root)]) == plain_parts([item.name])
    if folders and (not named or identity(root) in common):
        folders.remove(root)
    return OwnData(root, own, folders)


def freed_by(data: OwnData) -> int:
    """Return the bytes that deleting data frees: none of a file with a hard link elsewhere."""
    links = collections.Counter((file.device, file.inode) for file in data.files)
    freed = 0
    for file in data.files:
        status = os.lstat(file.path)
        if links[file.device, file.inode] == status.st_nlink:
            freed += status.st_blocks * 512 // status.st_nlink
    return freed


class Users:
    """Which items use which folders and lone files, by identity.

    All items of all rTorrents that are given; LoggableError where what one uses is not known.
    """

    def __init__(self, engines: Iterable[Engine]):
        self.engines = {engine.address.where: engine for engine in engines}
        self.folders: dict[Identity, list[tuple]] = {}      # -> (owner, path)
        self.files: dict[Identity, list[tuple]] = {}        # -> (owner, path, its folder)
        self.names: dict[str, dict[str, list[str]]] = {}    # folder -> plain part -> names
        for engine in self.engines.values():
            self.add_engine(engine)

    def add_engine(self, engine: Engine) -> None:
        """Add all items of an rTorrent, by directory and by base path: one may be old."""
        needs = ('d.hash', 'd.base_path', 'd.directory', 'd.name', 'd.is_multi_file')
        columns = fetch_columns(engine, 'default', needs)
        cwd, = without_errors(engine.ask([('system.cwd', '')]))
        for info_hash, base, directory, name, is_multi in zip(*columns.values()):
            if directory and not is_multi:
                directory = os.path.join(directory, name)
            try:
                for place in {base, directory} - {''}:
                    for path in self.meanings(os.path.join(cwd, place)):
                        self.add((engine.address.where, info_hash), path)
            except OSError as error:
                raise LoggableError(f'what item {quoted(name)} {info_hash} uses is not known: '
                                    f'{quoted(error.filename)}: {error.strerror}') from None

    def meanings(self, path: str) -> list[str]:
        """Return the paths on the disk that one may mean which came through badly."""
        if not DOUBTFUL.search(path):
            return [path]
        paths = ['/']
        for part in path.split('/'):
            found = []
            for folder in paths:
                names = [part]
                if DOUBTFUL.search(part):
                    names = self.like(folder, part)
                found += [os.path.join(folder, name) for name in names]
            paths = found
        return paths

    def like(self, folder: str, name: str) -> list[str]:
        """Return the names in a folder that one may mean."""
        if folder not in self.names:
            self.names[folder] = {}
            if identity(folder):
                there = os.listdir(folder)
                for plain, other in zip(plain_parts(there), there):
                    self.names[folder].setdefault(plain, []).append(other)
        return self.names[folder].get(plain_parts([name])[0], [])

    def add(self, owner: tuple[str, str], path: str) -> None:
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

    def of(self, data: OwnData, but: Iterable[tuple[str, str]] = ()) -> dict[tuple, str]:
        """Return who may use some of the data, owner -> path, without those in `but`."""
        users: dict[tuple, str] = {}
        for file in data.files:
            folder = identity(os.path.dirname(file.path))
            if folder in self.folders:
                users.update(self.folders[folder])
            for owner, path, other in self.files.get((file.device, file.inode), ()):
                # In another folder it is a hard link, which does not need this one.
                if folder == other or os.lstat(file.path).st_nlink == 1:
                    users[owner] = path
        return {owner: path for owner, path in users.items() if owner not in but}

    def has_all(self, owner: tuple[str, str], data: OwnData) -> bool:
        """Tell whether an item has all files of data in its own list, too."""
        where, info_hash = owner
        item = ask_item(self.engines[where], info_hash)
        known = set()
        for base in {item.base_path, item.directory} - {''}:
            known.add(identity(item.absolute(base)))
            for file in item.files:
                known.add(identity(item.absolute(f'{base}/{file.path}')))
        return all((file.device, file.inode) in known for file in data.files)


def copy_data(data: OwnData, root: str) -> None:
    """Have a whole copy of data at a new root, as hard links where that is possible."""
    import shutil
    folders = {}                        # of the copy -> its original
    for file in data.files:
        copy = root + file.path[len(data.root):]
        folder, original = os.path.dirname(copy), os.path.dirname(file.path)
        os.makedirs(folder, exist_ok=True)
        while len(original) >= len(data.root):
            folders[folder] = original
            folder, original = os.path.dirname(folder), os.path.dirname(original)
        before = os.lstat(file.path)
        try:
            os.link(file.path, copy)
        except OSError:                 # another file system, or one without hard links
            copy_file(file.path, copy)
        after = os.lstat(file.path)
        if before.st_ino != file.inode or (before.st_size, before.st_mtime_ns) != (
                after.st_size, after.st_mtime_ns):
            raise LoggableError(f'{quoted(file.path)} changed while it was copied')
    for folder, original in folders.items():
        give_owner(folder, os.stat(original))
        with contextlib.suppress(OSError):
            shutil.copystat(original, folder)
        sync(folder)
    sync(os.path.dirname(root))


def require_room(data: OwnData, folder: str) -> None:
    """Raise LoggableError where the disk of a folder, made or not, has no room for data."""
    device, free = disk_of(folder)
    needed = 0
    for file in data.files:
        if file.device != device:       # else a hard link will do
            needed += os.lstat(file.path).st_blocks * 512
    if needed > (free or 0):
        raise LoggableError(f'no room: {show_size(needed)} are needed at {quoted(folder)}, '
                            f'{show_size(free or 0)} are free')


class Removal:
    """A note of what is going to be removed: JSON in its first line, then steps that were done.

    It is on the disk before anything changes, and goes last. Until close() it is locked.
    """

    def __init__(self, path: str, stream: Any, facts: dict[str, Any], steps: list[str]):
        self.path, self.stream = path, stream
        self.facts, self.steps = facts, steps
        files = [OwnFile(*file) for file in facts['files']]
        self.data = OwnData(facts['root'], files, facts['folders'])

    def __str__(self) -> str:
        return f"{quoted(self.facts['name'])} {self.facts['hash']}"

    @classmethod
    def begin(cls, folder: str, item: Item, data: OwnData, **facts: Any) -> Removal:
        """Write a note. Raises LoggableError where another run has one for the same item."""
        import fcntl
        facts.update(data._asdict(), name=item.name, hash=item.hash,
                     engine=item.engine.address.where, session=item.session)
        path = os.path.join(folder, NOTE + item.hash)
        unfinished = f'{path}.{os.getpid()}.{threading.get_ident()}'
        with writing(path):
            stream = open_private(unfinished)
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stream.write(json.dumps(facts) + '\n')
                stream.flush()
                os.fsync(stream.fileno())
                os.link(unfinished, path)       # it is locked from its first moment on
                sync(folder)
            except BaseException as error:
                stream.close()
                if isinstance(error, FileExistsError):
                    raise LoggableError(f'another run is at it, or was ended: {path}') from None
                raise
            finally:
                os.remove(unfinished)
        return cls(path, stream, facts, [])

    @classmethod
    def take_up(cls, path: str) -> Removal | None:
        """Return the note that an ended run has left, None where its run goes on."""
        import fcntl
        try:
            stream = open(path, 'r+', encoding='utf-8', opener=open_own)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(stream.fileno()).st_nlink:      # else it was dropped just now
                first, *steps = stream.read().splitlines()
                return cls(path, stream, json.loads(first), steps)
        except BlockingIOError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            # It was not whole yet: nothing had begun.
            logging.getLogger('torque.data').info('%s is no note of a removal: %s', path, error)
            os.remove(path)
        stream.close()
        return None

    def mark(self, step: str) -> None:
        """Add a step that was done, on the disk when this returns."""
        with writing(self.path):
            self.stream.write(step + '\n')
            self.stream.flush()
            os.fsync(self.stream.fileno())
        self.steps.append(step)

    def remove_files(self) -> int:
        """Delete the files that are still the same, then empty folders; count the others.

        Raises LoggableError where the system refuses to.
        """
        others, refused = 0, None
        for file in self.data.files:
            folder, name = os.path.split(file.path)
            handle = None
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                status = os.stat(name, dir_fd=handle, follow_symlinks=False)
                if (status.st_dev, status.st_ino) == (file.device, file.inode):
                    os.unlink(name, dir_fd=handle)
                else:
                    others += 1
            except OSError as error:
                if error.errno not in NOT_THERE:
                    refused = error
            finally:
                if handle is not None:
                    os.close(handle)
        for folder in self.data.folders:
            with contextlib.suppress(OSError):      # something else is in it
                os.rmdir(folder)
        if refused:
            raise LoggableError(f'not all data at {quoted(self.data.root)} is deleted: '
                                f'{refused.strerror}; it is tried again in the next run')
        return others

    def drop(self) -> None:
        """Remove the note: all is done, or nothing is to be done."""
        with contextlib.suppress(OSError):
            os.remove(self.path)
        self.close()

    def close(self) -> None:
        """Let others have the note."""
        self.stream.close()


def left_removals(folder: str, engine: Engine) -> Iterator[Removal]:
    """Give the notes of an rTorrent that ended runs have left, each locked until the next."""
    names = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = sorted(os.listdir(folder))
    for name in names:
        removal = None
        if name.startswith(NOTE):
            removal = Removal.take_up(os.path.join(folder, name))
        if removal:
            with contextlib.closing(removal):
                if removal.facts['engine'] == engine.address.where:
                    yield removal


def why_keep(removal: Removal, engine: Engine, engines: Iterable[Engine]) -> str:
    """Return why the data of a note that was left is kept, '' where it is to go.

    It goes where its item was erased for sure, and nobody uses the data by now.
    """
    facts = removal.facts
    if [facts['session']] != engine.ask([('session.path', '')]):
        return 'that was another rTorrent'
    if 'erased' not in removal.steps:
        hashes = fetch_columns(engine, 'default', ['d.hash'])['d.hash']
        if facts['hash'] in hashes:
            return 'its item was not erased'
        if not hashes:
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

    def __init__(self, path: str):
        self.path, self.text = path, '{}'
        self.disks: dict[str, list[float]] = {}     # device -> bytes, free then, Unix seconds
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            with open(path, encoding='utf-8') as stream:
                self.text = stream.read()
            for disk, (promised, free, since) in json.loads(self.text).items():
                self.disks[disk] = [float(promised), float(free), float(since)]

    def owed(self, disk: int, free: int, now: float) -> float:
        """Return what has not appeared yet, now that a disk has `free` bytes."""
        promised, before, since = self.disks.get(str(disk), (0, 0, 0))
        if not 0 <= now - since < self.KEPT:
            return 0
        left = max(promised - max(free - before, 0), 0)
        self.disks[str(disk)] = [left, free, since]
        return left

    def add(self, disk: int, free: int, freed: int, now: float) -> None:
        """Expect a disk that has `free` bytes to have so many more soon."""
        self.disks[str(disk)] = [self.owed(disk, free, now) + freed, free, now]

    def save(self) -> None:
        """Keep this for later runs and processes."""
        text = json.dumps(self.disks)
        if text != self.text:
            replace_file(self.path, text)
            self.text = text


# --- Template --------------------------------------------------------------------------------
# Text with {{expressions}} and {{if}} ... {{endif}} enters, and values by name; text leaves,
# commands of rTorrent, or the arguments of a program. What an expression gives is data: the text
# around it is split into arguments first, with a mark for each value. A mistake is found when the
# template is made, and is shown with `<-- here` after its place. Pure functions, for any thread.

# What is not closed goes on to the end, so that looking for tags takes linear time.
TAG = re.compile(r'(\{\{.*?(?:\}\}|\Z)|\{%.*?(?:%\}|\Z)|\{#.*?(?:#\}|\Z))', re.S)
CLOSING = {'{': '}}', '%': '%}', '#': '#}'}
BRANCH = re.compile(r'(if|elif|else|endif)\b(.*)', re.S)
ELSE = ast.Constant(True)               # the condition of an else
MOST_EXPRESSION = 300                   # characters
MARK = '\0'                             # stands for a value while the text around it is split
COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge}


def show(value: Any) -> str:
    """Return a value as text: None is nothing, yes is 1, tags stand side by side."""
    if value is None:
        return ''
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return ' '.join(map(show, value))
    return str(value)


def part_of(value: Any, name: str, other: Any = None) -> Any:
    """Return a named part of a mapping; whatever else it is has none."""
    part = None
    if isinstance(value, Mapping):
        part = value.get(name)
    if part is None:
        return other
    return part


def stem_of(path: str) -> str:
    """Return the name of a file without folder and extension."""
    return os.path.splitext(os.path.basename(path))[0]


def show_time(when: Any) -> str:
    """Return local date and time of Unix seconds, nothing for an unknown time."""
    if not when:
        return ''
    return time.strftime('%F %T', time.localtime(when))


def value_or(value: Any, other: Any = '') -> Any:
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
    'dirname': os.path.dirname,
    'stem': stem_of}
VALUE_FILTERS: dict[str, Callable] = {  # they take values as they are
    'size': show_size,
    'duration': show_duration,
    'date': show_time,
    'default': value_or,
    'get': part_of}
FILTERS = (*TEXT_FILTERS, *VALUE_FILTERS)
FILTER_ARGUMENTS = {                    # how many they take; the others none
    'replace': (2,),
    'get': (1, 2),
    'default': (0, 1)}
OLD_FILTERS = {                         # pyrocore's names
    'pathbase': 'basename',
    'pathdir': 'dirname',
    'pathname': 'stem',
    'sz': 'size',
    'iso': 'date'}


def compares(op: ast.cmpop, one: Any, other: Any) -> bool:
    """Tell whether a comparison holds; what cannot be compared does not."""
    try:
        if isinstance(op, (ast.In, ast.NotIn)):
            return (one in other) is isinstance(op, ast.In)
        return bool(COMPARE[type(op)](one, other))
    except TypeError:
        return isinstance(op, ast.NotIn)


def apply_filter(node: Any, values: Mapping) -> Any:
    """Return what a|filter, a|filter(x), a|h.filter or a.filter(x) gives."""
    value, args, name = None, [], ''
    call: Any = node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        value, call = node.left, node.right
    if isinstance(call, ast.Call) and not call.keywords:
        call, args = call.func, call.args
        if isinstance(call, ast.Attribute) and value is None:
            value = call.value
    if isinstance(call, ast.Name):
        name = call.id
    elif isinstance(call, ast.Attribute):
        name = call.attr
    name = OLD_FILTERS.get(name, name)
    if value is None or name not in FILTERS:
        raise UserError(f'{name or type(node).__name__} is not possible; allowed are names, '
                        f'literals, and or not in, comparisons, | with {" ".join(FILTERS)}')
    if len(args) not in FILTER_ARGUMENTS.get(name, (0,)):
        raise UserError(f'{name} does not take {len(args)} arguments')
    operands = [evaluate(part, values) for part in [value, *args]]
    # What is not known stays so, till default gives something in its place.
    if operands[0] is None and name not in ('default', 'get'):
        return None
    if name in TEXT_FILTERS:
        return TEXT_FILTERS[name](*map(show, operands))
    return VALUE_FILTERS[name](*operands)


def attribute_of(node: ast.Attribute, values: Mapping) -> Any:
    """Return a.b: a named part of a mapping, or a value of the item, d or i."""
    owner = ''
    if isinstance(node.value, ast.Name):
        owner = node.value.id
    # pyrocore's templates call the torrent so; its fields are the names of the values.
    if owner in ('item', 'd', 'i'):
        return values[node.attr]
    if node.attr in (*FILTERS, *OLD_FILTERS) and owner != 'traits':
        raise UserError(f'{node.attr} is a filter; write |{node.attr}')
    return part_of(evaluate(node.value, values), node.attr)


def evaluate(node: Any, values: Mapping) -> Any:
    """Return what an expression gives; a name without a value is a KeyError.

    Allowed are names, a.b of mappings, literals, and or not, comparisons, a|filter(x), and the
    filters as methods, a.replace('.', ' '). Nothing reaches an object of Python. All parts are
    evaluated, so that one call with an empty defaultdict meets all mistakes and all names.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return ast.literal_eval(node)
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.Attribute) and not node.attr.startswith('_'):
        return attribute_of(node, values)
    if isinstance(node, (ast.Tuple, ast.List)):
        return [evaluate(part, values) for part in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not evaluate(node.operand, values)
    if isinstance(node, ast.BoolOp):
        parts = [evaluate(part, values) for part in node.values]
        for part in parts[:-1]:
            if bool(part) is isinstance(node.op, ast.Or):
                return part
        return parts[-1]
    if isinstance(node, ast.Compare) and not any(
            isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        parts = [evaluate(part, values) for part in [node.left, *node.comparators]]
        return all(map(compares, node.ops, parts, parts[1:]))
    return apply_filter(node, values)


class Template:
    """Text with {{expression}}, {{if}} ... {{endif}} and {{# comment }}.

    known: the names there will be, where that is known; others are refused. `names` are those
    it needs: item.name is `name`.

    >>> Template('{{if ratio > 1}}{{item.name|upper}}{{endif}}').render({'ratio': 2, 'name': 'a'})
    'A'
    """

    def __init__(self, text: str, known: Any = None):
        self.text, self.known = text, known
        self.pieces = TAG.split(text)
        self.next = 0                   # of the pieces
        self.at = 0                     # end of the piece in hand
        self.most_branches = 0          # of one if
        self.seen: dict = collections.defaultdict(lambda: None)
        try:
            if MARK in text:
                raise UserError('a NUL is not possible')
            self.nodes, word, _ = self.block(0)
            if word:
                raise UserError(f'{word} without if')
            # Each branch is divided once, and the text without any: a mistake in a branch that is
            # seldom taken is found now. At render() the text is divided, and checked, again.
            for number in range(self.most_branches + 1):
                self.divide(self.branch_text(self.nodes, number))
        except UserError as error:
            raise mistake('template', text, self.at, error) from None
        self.names = tuple(self.seen)

    def block(self, depth: int) -> tuple[list, str, str]:
        """Return the nodes up to elif, else, endif or the end; that word; its condition.

        A node is text, the ast of an expression, or of an if [(ast, nodes), ...].
        """
        nodes: list = []
        while self.next < len(self.pieces):
            piece = self.pieces[self.next]
            self.next += 1
            self.at += len(piece)
            if not TAG.fullmatch(piece):
                nodes.append(piece)
                continue
            if not piece.endswith(CLOSING[piece[1]]):
                raise UserError('a {{, {% or {# in this is not closed')
            if '#' in piece[1:3]:
                continue
            code = piece[2:-2].strip()
            if piece[1] == '%':
                code = code.strip('- \t\r\n')
            branch = BRANCH.fullmatch(code)
            if branch and branch[1] == 'if':
                nodes.append(self.branches(branch[2], depth + 1))
            elif branch:
                return nodes, branch[1], branch[2]
            elif piece[1] == '%':
                raise UserError(f'{quoted(piece, 60)} is no expression; allowed are if elif else '
                                'endif')
            else:
                nodes.append(self.expression(code))
        return nodes, '', ''

    def branches(self, code: str, depth: int) -> list:
        """Return [(ast, nodes), ...] of an if."""
        if depth > MOST_DEPTH:
            raise UserError(f'ifs are nested too deep; allowed are {MOST_DEPTH}')
        branches, word = [], 'if'
        while word != 'endif':
            test: ast.AST = ELSE
            if word != 'else':
                test = self.expression(code.strip().rstrip(':'))
            before = word
            nodes, word, code = self.block(depth)
            branches.append((test, nodes))
            if not word:
                raise UserError('an if has no endif')
            if before == 'else' and word != 'endif':
                raise UserError(f'{word} after else')
            if word in ('else', 'endif') and code.strip(' \t\r\n:'):
                raise UserError(f'{word} takes no condition; write elif')
        self.most_branches = max(self.most_branches, len(branches))
        return branches

    def expression(self, code: str) -> ast.AST:
        """Return the ast of an expression whose parts and names are allowed."""
        try:
            if len(code) > MOST_EXPRESSION:
                raise ValueError('too long')
            tree = ast.parse(code.strip(), mode='eval').body
            evaluate(tree, self.seen)
        # The parser itself fails over deep nesting and NULs, each Python in its own way.
        except (SyntaxError, TypeError, ValueError, OverflowError, OSError, MemoryError,
                RecursionError, Warning):
            raise UserError(f'{quoted(code, 60)} is no expression; allowed are e.g. label, '
                            "label|default('x'), 'TV' in flags and not is_private") from None
        if self.known is not None:
            for name in self.seen:
                self.check_name(name)
        return tree

    def check_name(self, name: str) -> None:
        """Refuse a name that there will not be; of torrents, some fields are made as needed."""
        made = self.known is TORRENT_FIELDS and re.match('item$|(custom|kind|d)_', name)
        if name not in self.known and not made:
            raise UserError(f'there is no {quoted(name)} here{nearest(name, self.known)}')

    def branch_text(self, nodes: list, number: int) -> str:
        """Return the text, a mark for each value, where each if takes the branch of a number."""
        text = ''
        for node in nodes:
            if isinstance(node, str):
                text += node
            elif isinstance(node, ast.AST):
                text += MARK
            elif number < len(node):
                text += self.branch_text(node[number][1], number)
        return text

    def marked(self, nodes: list, values: Mapping, shown: list[str]) -> str:
        """Return the text with a numbered mark for each value, which is added to `shown`."""
        text = ''
        for node in nodes:
            if isinstance(node, str):
                text += node
            elif isinstance(node, ast.AST):
                text += f'{MARK}{len(shown)}{MARK}'
                shown.append(show(evaluate(node, values)))
            else:
                for test, body in node:
                    if evaluate(test, values):
                        text += self.marked(body, values, shown)
                        break
        return text

    def parts(self, values: Mapping) -> tuple[list, list[str]]:
        """Return what the text is divided into, with marks, and the values for them."""
        shown: list[str] = []
        try:
            text = self.marked(self.nodes, values, shown)
        except (KeyError, TypeError, ValueError, OverflowError, OSError, RecursionError) as error:
            why = str(error)
            if isinstance(error, KeyError):
                why = f'there is no {error}'
            raise LoggableError(f'template {quoted(self.text, 80)}: {why}') from None
        return self.divide(text), shown

    def divide(self, text: str) -> list:
        """Return what the text is split into before the values are put in."""
        return [text]

    def render(self, values: Mapping) -> Any:
        """Return the text, values put in; LoggableError where one is missing."""
        (text,), shown = self.parts(values)
        return filled(text, shown)


def filled(text: str, shown: list[str]) -> str:
    """Return a part of a template with values in the place of the marks."""
    def value(mark: re.Match) -> str:
        return shown[int(mark[1])]
    return re.sub(f'{MARK}([0-9]{{1,9}}){MARK}', value, text)


# What may be run with a value in it. A list of programs cannot be complete, so what stands beside a
# value decides first, then the flag before it, then the program.
SAFE_WAY = """allowed is sh -c '... "$1"' sh {{name}}"""
SHELL_TEXT = re.compile(r"""["'`;|&$()<>{}\\\r\n]""")
TEXT_FLAG = '(?:-[A-Za-z0-9]{0,2}[ceErpS]|--(?:command|eval|exec|execute|expression|print|run))'
TEXT_FOLLOWS = re.compile(TEXT_FLAG)
TEXT_ATTACHED = re.compile(rf'{TEXT_FLAG}(?:=?{MARK}|.*\s)', re.S)
# These give what they are told to a shell, joined by spaces: no value is safe.
RUNS_ALL = frozenset('ssh rsh mosh su watch xargs tmux screen parallel at batch'.split())
# These run the first word that is no flag, or what stands after a flag ...
RUNNERS = frozenset('env sudo doas nice ionice nohup timeout setsid busybox toybox chroot flock '
                    'script runuser'.split())
SHELLS = frozenset('sh bash dash ash zsh ksh mksh lksh pdksh yash posh fish csh tcsh pwsh xonsh '
                   'rbash rksh rzsh'.split())
# ... and these, as shells do, leave to that program what stands after it; sed does not.
INTERPRETERS = SHELLS.union('python pypy perl ruby node nodejs deno bun php lua luajit tclsh wish '
                            'expect awk gawk mawk nawk guile Rscript julia groovy sed'.split())
FLAG_WITH_ARGUMENT = re.compile('[-+][A-Za-z]{0,9}[oOWXIdF]|--rcfile|--init-file')
SHELL_FLAG = re.compile('-[A-Za-z]{0,9}[cS][A-Za-z]{0,9}|--(command|split-string)')
SCRIPT_FLAG = re.compile('-[A-Za-z0-9.]{0,9}[ceErpSmfBR][A-Za-z0-9.]{0,9}|--[a-z-]{1,20}')


def program_name(word: str) -> str:
    """Return what a word is as the name of a program: no folder, no version."""
    return os.path.basename(word).rstrip('0123456789.-')


def check_program(name: str, words: list[str]) -> None:
    """Refuse a value in what an interpreter, or the like, takes for its program or its flags."""
    gives_text = SHELL_FLAG
    if name in INTERPRETERS - SHELLS:
        gives_text = SCRIPT_FLAG
    flag, given = '', False
    for word in words:
        is_text = not given or gives_text.fullmatch(flag)
        if name == 'env' and '=' in word:
            continue
        if MARK in word and is_text and flag != '-v':   # awk -v name={{name}} is data
            raise UserError(f'a value that a shell or the like would run; {SAFE_WAY}')
        if word.startswith(('-', '+')):
            flag = word
            continue
        if flag != '-v' and not FLAG_WITH_ARGUMENT.fullmatch(flag):
            more = name not in SHELLS and gives_text.fullmatch(flag)
            if name in INTERPRETERS and name != 'sed' and not more:
                return                  # what follows are arguments of its program
            given = True
        flag = ''


def check_words(words: list[str]) -> None:
    """Refuse a value inside what a program would run: no quoting is safe there.

    A value stands in a word of its own, or beside plain text.
    """
    if MARK in words[0]:
        raise UserError('the program is missing, or depends on a value')
    names = [program_name(word) for word in words]
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


def argument_text(word: str) -> str:
    """Return what an argument of a command says, without its quotes."""
    word = word.strip()
    whole = QUOTED_ARGUMENT.fullmatch(word)
    if whole:
        word = whole[1]
    elif '"' in word or word.startswith(('(', '{', '\\')):
        raise UserError('a value beside ( { $ or an open quote; allowed are words and "..."')
    text = re.sub(r'\\(.)', r'\1', word)
    if MARK in text and text.startswith('$'):
        raise UserError('a value beside ( { $ or an open quote; allowed are words and "..."')
    return text


class CommandTemplate(Template):
    r"""Commands of rTorrent, separated by ; or line breaks; one without values stays as it is.

    >>> print(CommandTemplate('d.custom.set=dir,/done/{{a}}').render({'a': 'x "y", z'}))
    d.custom.set="dir","/done/x \"y\", z"
    """

    def divide(self, text: str) -> list[tuple[str, list[str]]]:
        """Return (text, nothing) or (`name=`, arguments) of each command, values still marks."""
        commands = [part.strip() for part in split_commands(text, ';\n')]
        return [self.command(part) for part in commands if part]

    def command(self, text: str) -> tuple[str, list[str]]:
        """Return one command, divided."""
        text = OLD_SET.sub(r'\1.\2.set=', OLD_GET.sub(r'\1.\2=', text))
        name, equals, rest = text.partition('=')
        if not equals or not re.fullmatch(r'[A-Za-z_][\w.]*\s*', name):
            raise UserError(f'{quoted(text.replace(MARK, "{{..}}"), 60)} is not a command; '
                            'allowed is name=argument,...')
        if lacks_file(text):
            raise UserError('an f. command without a file makes rTorrent abort; allowed is e.g. '
                            'f.multicall=*.nfo,f.priority.set=2')
        # Without a value it is the user's own, and goes to rTorrent as it is written.
        if MARK not in rest:
            return text, []
        name = name.strip()
        if not DATA_COMMAND.fullmatch(name):
            raise UserError(f'{name} might run the value; allowed are e.g. d.custom.set, print')
        words = [argument_text(word) for word in split_commands(rest, ',')]
        if name.startswith('execute'):
            check_words(words)
        return name + '=', words

    def commands(self, values: Mapping) -> list[str]:
        """Return the commands, each fit for load.*; none where all is empty."""
        divided, shown = self.parts(values)
        commands = []
        for name, words in divided:
            arguments = [self.argument(word, filled(word, shown)) for word in words]
            commands.append(name + ','.join(arguments))
        return commands

    def render(self, values: Mapping) -> str:
        """Return the commands as one text, which load.* takes too."""
        return ' ; '.join(self.commands(values))

    @staticmethod
    def argument(word: str, text: str) -> str:
        """Return an argument quoted as a whole.

        rTorrent RUNS one that begins with $, quoted or not; (cat,{"..."}) keeps it as it is (seen
        on 0.9.8 and 0.16.17).
        """
        plain = '"' + text.replace('\\', '\\\\').replace('"', '\\"') + '"'
        if MARK in word and text.startswith('$'):
            return f'(cat,{{{plain}}})'
        return plain


class ArgsTemplate(Template):
    """An external command as a list; no shell is involved.

    >>> ArgsTemplate('mv -- {{item.name}} "/old stuff"').render({'name': 'a; b'})
    ['mv', '--', 'a; b', '/old stuff']
    """

    def divide(self, text: str) -> list[str]:
        """Return the arguments, values still marks."""
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f'{error}; allowed are words, "..." and \'...\'') from None
        check_words(words or [MARK])
        return words

    def render(self, values: Mapping) -> list[str]:
        """Return the arguments; LoggableError for a value that would pass for an option."""
        words, shown = self.parts(values)
        args: list[str] = []
        for word in words:
            args.append(filled(word, shown))
            # A torrent may be called -rf.
            if word.startswith(MARK) and args[-1].startswith('-') and '--' not in args:
                raise LoggableError(f'{quoted(args[-1])} would be an option of {quoted(args[0])}; '
                                    'write -- before it')
        return args


# --- Jobs ------------------------------------------------------------------------------------
# A job is made from its settings (`config`) and run() is called when it is due. It talks to
# its engine and to nothing above: files, threads and signals are other sections' business.
# Built-in jobs list their options in a table that checks the ini and prints the help.

SECRET = '(?i)(?:pass(?:word|wd|phrase)?|secret|token|api.?key)'      # in names of settings


class Settings(dict):
    """Settings by name: config.path or config['path']; as an attribute, None when missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return self.get(name)

    __setattr__ = dict.__setitem__

    def __repr__(self) -> str:
        return repr({name: '***' if re.search(SECRET + '$', name) and value else
                     redacted(value) if isinstance(value, str) else value
                     for name, value in self.items()})


class JobConfig(Settings):
    """The settings of one job: job.NAME.* without that prefix, job_name, dry_run, active.

    engine is the job's rTorrent, engines are all of the configuration. state_dir is where it may
    keep a file.
    """
    engine: Any
    engines: Any
    state_dir: str
    alone: bool                         # a single run, beside the daemon perhaps
    __setattr__ = object.__setattr__


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
        kinds: dict = {parse_bool: 'yes/no', parse_count: 'number', parse_duration: 'time',
                       parse_size: 'size'}
        return kinds.get(self.parse, 'text')


def get_class_logger(job: Any) -> logging.Logger:
    """Return the logger of a job: its lines carry the job's name."""
    config = getattr(job, 'config', None)
    return logging.getLogger(f"torque.{getattr(config, 'job_name', None) or type(job).__name__}")


class Job:
    """What built-in jobs share; a plain class with __init__(config) and run() is a job too."""
    options: Any = None                 # None: any option is taken, as the ini has it
    section = ''                        # the ini section that gives options their defaults
    families: tuple[str, ...] = ()      # beginnings of options that may have any name
    at_start = False                    # run at the start, too

    def __init__(self, config: JobConfig):
        self.config = config
        self.LOG = get_class_logger(self)
        self.engine: Engine = config.engine
        self.dry_run = bool(config.dry_run)

    def state_file(self, ending: str) -> str:
        """Return the path of a file that the job may keep."""
        name = f'{self.config.job_name}.{ending}'.replace('/', '_')
        return os.path.join(self.config.state_dir, name)

    def announce(self, *words: Any) -> bool:
        """Log what is done now, and tell whether to do it: a dry run only says so."""
        self.LOG.info('%s%s', 'dry run, not done: ' if self.dry_run else '',
                      ' '.join(str(word) for word in words if word))
        return not self.dry_run

    def act(self, method: str, *params: Any) -> Any:
        """Call a command that changes something in rTorrent; a dry run only says so."""
        if self.dry_run:
            self.announce(method, *map(quoted, params))
            return None
        return self.engine.open().call(method, *params)


class EngineStats(Job):
    """Log a line on rTorrent's state: version, torrents, traffic, speed of its answer."""
    options = ()
    at_start = True                     # so that a new user sees at once whether it answers

    def run(self) -> None:
        """Log the line; raises RpcError where rTorrent does not tell."""
        stats = self.engine.stats()
        started = '' if stats.uptime is None else f' up {show_duration(stats.uptime)}'
        rates = [f'{way} ' + ('?' if rate is None else f'{show_size(rate)}/s')
                 + (f' of {show_size(limit)}' if limit else '') for way, rate, limit in (
                     ('up', stats.up_rate, stats.up_limit),
                     ('down', stats.down_rate, stats.down_limit))]
        torrents, active = ('?' if stats.views[view] is None else stats.views[view]
                            for view in ('main', 'active'))
        self.LOG.info('%s rTorrent %s%s; %s torrents, %s active; %s; rpc %.1f ms',
                      stats.engine_id, stats.version, started, torrents, active,
                      ', '.join(rates), stats.rpc_time * 1000)


def parse_pairs(text: str) -> dict[str, str]:
    """Return what stands in `name=value, name=value`."""
    pairs = {part.partition('=')[0].strip(): part.partition('=')[2].strip()
            for part in text.split(',') if part.strip()}
    if not all(name and value for name, value in pairs.items()):
        raise UserError(f'{text!r} is not understood; allowed is name=value, name=value')
    return pairs


def parse_form(form: re.Pattern, what: str, text: str) -> str:
    """Return the first group of a regex that text has to match; what: what it should have been."""
    found = form.fullmatch(text)
    if not found:
        raise UserError(f'{redacted(text)!r} is no {what}')
    return found[1]


parse_web_url = functools.partial(
    parse_form, re.compile(r'(https?://[^/@\s]+(?:/\S*[^\s/])?)/*'),
    'web address; allowed is http(s)://host:port, with user and password as settings')
parse_ping_url = functools.partial(
    parse_form, re.compile(
        r'(https?://[\w.-]+(?::\d+)?(?:[/?]\S*)?|https?://\[[\da-fA-F:]+\]\S*|)'),
    'web address; allowed is http(s)://host/..., without user and password')
parse_api = functools.partial(
    parse_form, re.compile('([123]?)'), 'version of the interface; allowed are 1, 2, 3')


def influx_line(series: str, tags: dict, fields: dict, when: float) -> str:
    """Return a point in line protocol, with milliseconds; fields that are None are left out.

    >>> influx_line('s', {'a b': 'c,d'}, {'n': 1, 'x': 0.5, 't': 'y"', 'z': None}, 2)
    's,a\\\\ b=c\\\\,d n=1i,x=0.5,t="y\\\\"" 2000'
    """
    def escape(text: Any) -> str:
        return re.sub(r'([,= ])', r'\\\1', re.sub(r'[\x00-\x1f\\]+', ' ', str(text)).strip())

    def value(item: Any) -> str:
        """Return a field's value as its type is written."""
        if isinstance(item, (bool, float)):
            return str(item)
        if isinstance(item, int):
            return f'{item}i'
        return '"%s"' % re.sub(r'(["\\])', r'\\\1', re.sub(r'[\x00-\x1f]', ' ', str(item)))

    names = ''.join(f',{escape(name)}={escape(tag)}' for name, tag in sorted(tags.items()))
    values = ','.join(f'{escape(name)}={value(item)}' for name, item in fields.items()
                      if item is not None)
    return f'{escape(series)}{names} {values} {int(when * 1000)}'


def host_figures() -> dict:
    """Return load, memory in bytes, and network bytes of this machine, where /proc has them."""
    figures: dict = {}
    with contextlib.suppress(OSError):  # not Linux: what could be had
        figures.update(zip(('load1', 'load5', 'load15'), os.getloadavg()))
        with open('/proc/meminfo', encoding='ascii') as stream:
            memory = dict(re.findall(r'(?m)^(\w+): +(\d+) kB', stream.read()))
        figures.update((name, int(memory[key]) * 1024) for name, key in (
            ('memory_total', 'MemTotal'), ('memory_available', 'MemAvailable'),
            ('swap_total', 'SwapTotal'), ('swap_free', 'SwapFree')) if key in memory)
        with open('/proc/net/dev', encoding='ascii') as stream:
            rows = re.findall(r'^ *(?!lo:)\S+:(.+)', stream.read(), re.M)
        for name, column in (('net_received', 0), ('net_sent', 8)):
            figures[name] = sum(int(row.split()[column]) for row in rows)
    return figures


def read_secret(path: str) -> str:
    """Return the first line of a file that holds a password or token; '' for no file."""
    try:
        with open(os.path.expanduser(path or os.devnull), encoding='utf-8') as stream:
            return stream.readline().strip()
    except (OSError, ValueError) as error:
        raise LoggableError(f'{path}: {getattr(error, "strerror", "") or error}') from None


class InfluxDB(Job):
    """Push figures of rTorrent and of the host to InfluxDB, or what speaks its line protocol."""
    section = 'INFLUXDB'
    options = (
        Option('url', parse_web_url, 'http://localhost:8086', 'base URL of the server'),
        Option('user', str, '', 'account (1.x)'),
        Option('password', str, '', 'password of that account'),
        Option('password_file', str, '', 'file that holds the password'),
        Option('token', str, '', 'API token (2.x, 3.x)'),
        Option('token_file', str, '', 'file that holds the token'),
        Option('org', str, '', 'organization (2.x)'),
        Option('bucket', str, '', 'bucket (2.x); left out, dbname'),
        Option('api', parse_api, '', '1, 2 or 3; left out, 2 where org or bucket is set, else 1'),
        Option('timeout', parse_duration, '10s', 'most time for one request'),
        Option('gzip', parse_bool, 'no', 'compress what is sent'),
        Option('dbname', str, 'torque', 'database (1.x, 3.x)'),
        Option('series', str, 'rtorrent', 'series for rTorrent, and <series>_views; or empty'),
        Option('series_host', str, 'host', 'series for host data; empty for none'),
        Option('disk_path', str, '~', 'paths whose disks are measured, separated by :'),
        Option('tags', parse_pairs, '', 'tags for every point: name=value, name=value'),
        Option('buffer', parse_count, '10000', 'most points kept while the server is away'))
    BATCH = 5000                        # lines in one request
    LONGEST_PAUSE = 300                 # seconds between tries

    def __init__(self, config: JobConfig):
        super().__init__(config)
        if not config.series and not config.series_host:
            raise UserError('series and series_host are both empty: nothing to push')
        self.api = config.api or ('2' if config.org or config.bucket else '1')
        self.pause = self.retry_at = self.saved_at = 0.0
        self.problem = ''
        self.file = '' if config.alone else self.state_file('points')
        self.points: list[str] = []
        self.load()                             # a file that cannot be read stops the start
        self.loaded = False

    def load(self) -> list[str]:
        """Return the points that an earlier process could not deliver."""
        try:
            with open(self.file or os.devnull, encoding='utf-8', errors='replace') as stream:
                return [line for line in stream.read().split('\n')
                        if re.fullmatch(r'\S.* [0-9]{1,20}', line)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f'{self.file}: {error.strerror}') from None

    def save(self) -> None:
        """Keep undelivered points for the next process, or remove what was kept."""
        self.saved_at = elapsed_time()
        if not self.file or not self.loaded:
            return
        try:
            if self.points:
                replace_file(self.file, '\n'.join(self.points) + '\n')
            elif os.path.exists(self.file):
                os.remove(self.file)
        except (LoggableError, OSError) as error:
            self.LOG.warning('%d points cannot be saved: %s', len(self.points), error)

    cleanup = save

    def run(self) -> None:
        """Measure, and deliver all that waits; LoggableError for what has to wait on."""
        lines, problems = self.measure()
        if self.dry_run:
            self.announce('sending to', self.config.url, ' | '.join(lines))
        else:
            if not self.loaded:                 # not before a job that this one replaces has saved
                self.points.extend(self.load())
                self.loaded = True
            self.points.extend(lines)
            try:
                self.deliver()
            finally:
                if elapsed_time() - self.saved_at >= 60 or not self.points:
                    self.save()
        if problems:
            raise problems[0]

    def measure(self) -> tuple[list[str], list[LoggableError]]:
        """Return the points of this moment, and what kept others from being among them."""
        import shutil
        config, now = self.config, time.time()
        lines: list[str] = []
        problems: list[LoggableError] = []

        def add(series: str, figures: dict, **tags: str) -> None:
            if any(figure is not None for figure in figures.values()):
                lines.append(influx_line(series, {**tags, **config.tags}, figures, now))

        if config.series:
            try:
                stats = self.engine.stats()._asdict()
                views, uptime = stats.pop('views'), stats.pop('uptime')
                stats['uptime'] = None if uptime is None else int(uptime)
                name = stats['engine_id'].partition(':')[0]
                add(config.series, stats, host=name)
                add(config.series + '_views', views, host=name)
            except RpcError as error:
                problems.append(error)
        if config.series_host:
            name = socket.gethostname()
            add(config.series_host, host_figures(), host=name)
            for path in filter(None, config.disk_path.split(os.pathsep)):
                try:
                    disk = shutil.disk_usage(os.path.expanduser(path))
                    add(config.series_host, {'disk_total': disk.total, 'disk_free': disk.free},
                        disk=path, host=name)
                except OSError as error:
                    problems.append(LoggableError(f'disk_path {path!r}: {error.strerror}'))
        return lines, problems

    def deliver(self) -> None:
        """Send all points, oldest first; raises LoggableError when some have to wait."""
        while self.points and elapsed_time() >= self.retry_at:
            lines = self.points[:self.BATCH]
            try:
                self.post(lines)
                self.pause = 0.0
                del self.points[:len(lines)]
            except LoggableError as error:
                self.problem = f'{self.config.url}: {error}'
                self.pause = min(max(self.pause * 2, 5), self.LONGEST_PAUSE)
                self.retry_at = elapsed_time() + (error.pause or self.pause)
        if self.points:
            lost = max(len(self.points) - self.config.buffer, 0)
            del self.points[:lost]
            kept = f'{len(self.points)} points are kept' if self.file else 'nothing is kept'
            dropped = f', the oldest {lost} dropped' if lost else ''
            raise LoggableError(f'{self.problem}; {kept}{dropped}')

    def post(self, lines: list[str]) -> None:
        """Write points, in parts where the server wants that; drop what it calls malformed.

        Raises LoggableError when they have to be kept.
        """
        answer = self.request('\n'.join(lines).encode())
        if answer.status in (200, 204):
            return
        said = f'HTTP {answer.status} {answer.reason} {quoted(beginning(answer.body))}'
        if answer.status == 413 and len(lines) > 1:
            half = len(lines) // 2
            self.post(lines[:half])
            self.post(lines[half:])
        elif answer.status in (400, 413, 422):
            parts = collections.defaultdict(list)
            for line in lines:
                parts[re.split(r'(?<!\\)[, ]', line)[0]].append(line)
            if len(parts) == 1:
                self.LOG.warning('%s: %d points of %s were refused and dropped: %s',
                                 self.config.url, len(lines), *parts, said)
                return
            for part in parts.values():         # one bad series must not cost the others
                self.post(part)
        else:
            refused = LoggableError(said)
            after = answer.headers.get('retry-after', '')
            refused.pause = min(int(after), 3600) if after.isdigit() else None
            raise refused

    def request(self, body: bytes) -> HttpAnswer:
        """Return the server's answer to points in line protocol."""
        from urllib.parse import urlencode
        config = self.config
        path, query = {
            '1': ('/write', {'db': config.dbname, 'precision': 'ms'}),
            '2': ('/api/v2/write', {'org': config.org, 'bucket': config.bucket or config.dbname,
                                    'precision': 'ms'}),
            '3': ('/api/v3/write_lp', {'db': config.dbname, 'precision': 'millisecond'})}[self.api]
        headers = {'Content-Type': 'text/plain; charset=utf-8'}
        token = config.token or read_secret(config.token_file)
        password = config.password or read_secret(config.password_file)
        if token:
            headers['Authorization'] = f"{'Bearer' if self.api == '3' else 'Token'} {token}"
        elif config.user:
            login = f'{config.user}:{password}'.encode()
            headers['Authorization'] = f'Basic {binascii.b2a_base64(login, newline=False).decode()}'
        if config.gzip:
            import gzip
            body, headers['Content-Encoding'] = gzip.compress(body), 'gzip'
        return http_post(f'{config.url}{path}?{urlencode(query)}', body, headers, config.timeout)


def parse_condition(text: str) -> Filter | None:
    """Return the Filter of a condition, None for an empty one."""
    return Filter(text) if str(text).strip() else None


def parse_sort(text: str) -> list[tuple[str, bool]]:
    """Return (field, reversed) of each key in `-prio, loaded, name`."""
    keys = [(word.lstrip('-'), word[0] == '-') for word in re.split(r'[\s,]+', text) if word]
    for name, _ in keys:
        torrent_field(name)
    return keys


@contextlib.contextmanager
def reading(option: str) -> Iterator[None]:
    """Let a mistake found in here say of which option it is."""
    try:
        yield
    except UserError as error:
        error.option = option
        raise


def in_order(torrents: list[Torrent], keys: list[tuple[str, bool]]) -> list[Torrent]:
    """Return torrents sorted by the keys; what is not known comes first."""
    for name, backwards in reversed(keys):
        torrents = sorted(torrents, key=lambda torrent: (  # noqa: B023
            torrent[name] is not None, isinstance(torrent[name], str),
            0 if torrent[name] is None else torrent[name]), reverse=backwards)
    return torrents


class Choice(Job):
    """What jobs share that handle the torrents of a view that meet a condition."""
    options: Any = (
        Option('view', str, 'main', 'view of rTorrent that is looked at'),
        Option('matcher', parse_condition, '', 'condition that a torrent must meet'),
        Option('sort', parse_sort, 'name, hash', 'fields that give the order; - reverses'))
    fields: tuple = ()                  # what the job needs to know of a torrent, too
    deletes = False                     # then it says more of what it leaves alone
    FRESH = 1.0                         # seconds that a list may be old

    def __init__(self, config: JobConfig):
        super().__init__(config)
        if not config.matcher:
            raise UserError('is not set; for all torrents write matcher = *', option='matcher')
        self.failures: list[Exception] = []             # of torrents, in this run
        self.held: collections.Counter = collections.Counter()  # reason -> torrents, in this run
        self.repeats = Repeats()

    def use(self, option: str, make: Callable, text: str) -> Any:
        """Return the template that is made of an option, and have known what it needs."""
        with reading(option):
            template = make(text, TORRENT_FIELDS)
            for name in template.names:
                torrent_field(name)
        self.fields += template.names
        return template

    def chosen(self) -> list[Torrent]:
        """Return the torrents that meet the condition, in order."""
        config = self.config
        return in_order(list_torrents(self.engine, config.view or 'main', [
            *self.fields, *(name for name, _ in config.sort)], config.matcher), config.sort)

    def engines(self) -> list[Engine]:
        """Return all rTorrents of the configuration, that of the job among them."""
        return [self.engine, *(self.config.engines or ())]

    def hold_back(self, torrents: Iterable[Torrent], why: str) -> None:
        """Log which torrents are left alone for now."""
        level = logging.DEBUG
        if self.dry_run:
            level = logging.INFO
        for torrent in torrents:
            self.LOG.log(level, 'held back: %s: %s', torrent, why)
            self.held[why] += 1

    def failed(self, torrent: Torrent, error: Exception) -> None:
        """Log why a torrent failed: in full once, then summed up."""
        self.failures.append(error)
        again = self.repeats.seen((torrent['hash'], str(error)), elapsed_time())
        if self.dry_run:
            self.hold_back([torrent], str(error))
        elif again and again[0]:
            self.LOG.warning('%s: still, %d times in %s: %s', torrent, again[0],
                             show_duration(again[1]), error)
        elif again:
            self.LOG.warning('%s: %s', torrent, error)

    def each(self, torrents: list[Torrent], handle: Callable[[Torrent], bool],
             most: int | None = None) -> None:
        """Handle the torrents, until so many were changed; one that fails costs its turn only.

        handle: tells whether it changed the torrent. After a while they are looked at again: the
        user may have changed them meanwhile.
        """
        done, listed = 0, elapsed_time()
        self.failures = []
        current = {torrent['hash']: torrent for torrent in torrents}
        for at, torrent in enumerate(torrents):
            if done == most:
                self.hold_back(torrents[at:], f'the limit is {most}')
                break
            if elapsed_time() - listed > self.FRESH:
                current = {now['hash']: now for now in self.chosen()}
                listed = elapsed_time()
            if torrent['hash'] not in current:
                self.LOG.info('%s does not meet the condition any more', torrent)
                continue
            try:
                if handle(current[torrent['hash']]):
                    done += 1
            except Unreachable:
                raise
            except (LoggableError, OSError, ValueError) as error:       # of a path with a NUL, say
                self.failed(torrent, error)
        if self.deletes and not self.dry_run:
            for why, count in self.held.items():
                self.LOG.info('%d held back: %s', count, why)
        if self.failures:
            raise LoggableError(f'{len(self.failures)} torrents failed, the last: '
                                f'{self.failures[-1]}')


class QueueManager(Job):
    """Start waiting torrents, a few per run, while there is room."""
    section = 'TORQUE'
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

    def __init__(self, config: JobConfig):
        super().__init__(config)
        self.running = parse_condition(self.RUNNING)
        self.startable = parse_condition(' '.join(f'[ {condition.text} ]' for condition in (
            config.queue_startable_base, config.startable) if condition))
        self.needs = ('left', 'path') if config.room else ()
        self.file = self.state_file('last_start')
        self.last_start = 0.0
        with contextlib.suppress(OSError, ValueError), open(self.file, encoding='ascii') as stream:
            self.last_start = float(stream.read())

    def run(self) -> None:
        """Start what there is a place for, in order, unless the intermission goes on."""
        config, now = self.config, time.time()
        self.last_start = min(self.last_start, now)     # the clock may have been set back
        if now < self.last_start + config.intermission:
            self.LOG.debug('no start: the intermission is not over')
            return
        if not self.places(self.list_running()):
            return
        view = config.viewname or ('pyrotorque' if self.engine.has_view('pyrotorque') else 'main')
        startable = in_order(list_torrents(self.engine, view, [
            *self.needs, *(name for name, _ in config.sort_fields)], self.startable),
            config.sort_fields)
        if not startable:
            self.LOG.debug('no start: nothing is startable')
            return
        running = self.list_running()           # again: listing took time, and a view may be stale
        hashes = {torrent['hash'] for torrent in running}
        ready: Iterable[Torrent] = [torrent for torrent in startable
                                    if torrent['hash'] not in hashes]
        if config.room:
            ready = self.fitting(ready, running)
        for torrent in itertools.islice(ready, self.places(running)):
            self.start(torrent, now)

    def list_running(self) -> list[Torrent]:
        """Return all that is started and not complete: hashing, paused or failing, too."""
        config = self.config
        return list_torrents(self.engine, 'default', [
            'is_active', 'down', *self.needs,
            *(config.downloading.fields if config.downloading else ())], self.running)

    def places(self, running: list[Torrent]) -> int:
        """Return how many may be started in this run, beside what is running."""
        config, now = self.config, time.time()
        downloading = [torrent for torrent in running if not torrent['is_active']
                       or not config.downloading or config.downloading.match(torrent, now)]
        count, traffic = len(downloading), sum(torrent['down'] for torrent in downloading)
        if 0 < config.downloading_traffic_max < traffic:
            self.LOG.debug('no start: %s/s are downloaded', show_size(traffic))
            return 0
        self.LOG.debug('%d of at most %d are downloading', count, config.downloading_max)
        return max(min(max(config.start_at_once, config.downloading_min - count),
                       config.downloading_max - count), 0)

    def fitting(self, torrents: Iterable[Torrent], running: list[Torrent]) -> Iterator[Torrent]:
        """Give the items that their disk has room for, beside what is still coming to it."""
        coming: dict = collections.Counter()
        for torrent in running:
            coming[disk_of(torrent['path'])[0]] += torrent['left']
        for torrent in torrents:
            device, free = disk_of(torrent['path'])
            if free is None or free - coming[device] - torrent['left'] < self.config.room:
                self.LOG.debug('no room for %s: %s to come, %s free, %s promised', torrent,
                               *map(show_size, (torrent['left'], free or 0, coming[device])))
                continue
            coming[device] += torrent['left']
            yield torrent

    def start(self, torrent: Torrent, now: float) -> None:
        """Start an item, having noted when."""
        if not self.announce('starting', torrent):
            return
        if self.config.intermission and self.last_start != now:
            replace_file(self.file, f'{now}\n')
        self.last_start = now
        proxy = self.engine.open()
        proxy.d.start(torrent['hash'])
        if self.config.log_to_client and not self.config.quiet:
            with contextlib.suppress(RpcError):         # older ones take no emoji, for example
                proxy.call('print', '', f"torque: started {quoted(torrent['name'])}")


def start_commands(item: Torrent, args: str) -> list[tuple]:
    """Start, unless it is active."""
    if item['is_active']:
        return []
    return [('d.start',)]


def stop_commands(item: Torrent, args: str) -> list[tuple]:
    """Stop, also what is to be started when there is a place."""
    if item['is_active'] or item['d_state']:
        return [('d.stop',)]
    return []


def close_commands(item: Torrent, args: str) -> list[tuple]:
    """Stop and close."""
    if item['is_open'] or item['d_state']:
        return [('d.stop',), ('d.close',)]
    return []


def open_commands(item: Torrent, args: str) -> list[tuple]:
    """Open, without starting."""
    if item['is_open']:
        return []
    return [('d.open',)]


def check_commands(item: Torrent, args: str) -> list[tuple]:
    """Check the data."""
    return [('d.check_hash',)]


def ignore_commands(item: Torrent, args: str) -> list[tuple]:
    """Have it ignored by rTorrent's own ratio groups and the like."""
    if item['is_ignored']:
        return []
    return [('d.ignore_commands.set', 1)]


def heed_commands(item: Torrent, args: str) -> list[tuple]:
    """Undo ignore."""
    if not item['is_ignored']:
        return []
    return [('d.ignore_commands.set', 0)]


def delete_commands(item: Torrent, args: str) -> list[tuple]:
    """Take it out of rTorrent; the data stays."""
    return [('d.stop',), ('d.close',), ('d.erase',)]


def tags_command(item: Torrent, tags: set[str]) -> list[tuple]:
    """Give it these tags, unless it has them."""
    if tags == {*item['tagged']}:
        return []
    return [('d.custom.set', 'tags', ' '.join(sorted(tags)))]


def tag_commands(item: Torrent, args: str) -> list[tuple]:
    """Add tags."""
    return tags_command(item, {*item['tagged'], *args.lower().replace(',', ' ').split()})


def untag_commands(item: Torrent, args: str) -> list[tuple]:
    """Take tags away."""
    return tags_command(item, {*item['tagged']}.difference(args.lower().replace(',', ' ').split()))


def custom_commands(item: Torrent, args: str) -> list[tuple]:
    """Set a custom value, KEY=VALUE."""
    key, _, value = args.partition('=')
    if key in ('1', '2', '3', '4', '5'):
        return [(f'd.custom{key}.set', value)]
    return [('d.custom.set', key, value)]


def prio_commands(item: Torrent, args: str) -> list[tuple]:
    """Set the priority."""
    if item['prio'] == int(args):
        return []
    return [('d.priority.set', int(args)), ('d.update_priorities',)]


def throttle_commands(item: Torrent, args: str) -> list[tuple]:
    """Put it into a throttle group, which rTorrent allows only while it is stopped."""
    change = ('d.throttle_name.set', args)
    if item['throttle'] == args:
        return []
    if item['is_active']:
        return [('d.stop',), change, ('d.start',)]
    return [change]


# Action -> fields that it needs, and the commands for an item, without its hash, that it comes to;
# none where there is nothing to do. What has no such function is a method of Action.
CLOSED = '; it is closed: which files are its own is known once it has been opened for that'
ACTION_COMMANDS: dict[str, tuple[str, Callable | None]] = {
    'start': ('is_active', start_commands), 'stop': ('is_active d_state', stop_commands),
    'close': ('is_open d_state', close_commands), 'open': ('is_open', open_commands),
    'hash_check': ('', check_commands), 'ignore': ('is_ignored', ignore_commands),
    'heed': ('is_ignored', heed_commands), 'delete': ('is_hashing', delete_commands),
    'cull': ('is_hashing is_open path d_completed_bytes', None), 'tag': ('tagged', tag_commands),
    'untag': ('tagged', untag_commands), 'custom': ('', custom_commands),
    'prio': ('prio', prio_commands), 'throttle': ('throttle is_active', throttle_commands),
    'exec': ('', None), 'log': ('', None)}
WITH_ARGS = ('tag', 'untag', 'custom', 'prio', 'throttle', 'exec', 'log')       # log may have some


def parse_word(known: Iterable[str], text: str) -> str:
    """Return a word that has to be one of those known."""
    if text not in known:
        what = 'is not set'
        if text:
            what = f'{text!r} is not known'
        raise UserError(f"{what}; allowed are {' '.join(known)}{nearest(text, known)}")
    return text


class Action(Choice):
    """Do something with every torrent that meets a condition; deleting has guards."""
    options = (
        *Choice.options,
        Option('action', functools.partial(parse_word, ACTION_COMMANDS), '', ' '.join(ACTION_COMMANDS)),
        Option('args', str, '', 'template for tag untag throttle log, KEY=VALUE for custom, 0 to '
                                '3 for prio, commands of rTorrent for exec'),
        Option('limit', parse_count, '', 'most torrents in a run; left out, all, or 10 to delete'),
        Option('confirm', parse_count, '1', 'act on what met the condition so many runs in a row'),
        Option('until_free', parse_size, '0', 'cull one by one until this much is free; 0: all'),
        Option('shared', functools.partial(parse_word, ('keep', 'delete')), 'keep',
               'data that another item has, too: keep or delete'))

    def __init__(self, config: JobConfig):
        super().__init__(config)
        action, args = config.action, config.args
        if action == 'custom':
            args = '='.join(part.strip() for part in args.split('=', 1))
        if config.until_free and action != 'cull':
            raise UserError('is for the action cull: nothing else frees anything',
                            option='until_free')
        for wrong, why in (
                (not args and action in WITH_ARGS[:-1],
                 f'is not set; the action {action} needs it'),
                (args and action not in WITH_ARGS, f'the action {action} takes none'),
                (action == 'prio' and args not in ('0', '1', '2', '3'),
                 f'{args!r} is no priority; allowed are 0 1 2 3'),
                (action == 'custom' and not re.match(r'[\w.-]+=', args),
                 f'{args!r} is not KEY=VALUE'),
                (action == 'custom' and re.match(r'(label|custom_?[1-5])=', args),
                 f'{args!r}: the label is called 1, the others 2 to 5; write 1=VALUE'),
                (action in ('tag', 'untag') and re.search(r'(^|[\s,])[+-]', TAG.sub('x', args)),
                 f'{args!r}: tags have no sign; the actions are tag and untag')):
            if wrong:
                raise UserError(why, option='args')
        if (action, args) == ('throttle', 'none'):
            args = ''
        self.deletes = action in ('delete', 'cull')
        self.fields = tuple(ACTION_COMMANDS[action][0].split())
        make = Template
        if action == 'exec':
            make = CommandTemplate
        self.template = self.use('args', make, args)
        self.met: dict[str, int] = {}           # hash -> runs in a row that it met the condition
        self.gone: list[tuple] = []             # owners that this dry run would have erased
        self.promised: Any = None               # PromisedSpace of this run

    def run(self) -> None:
        """Act on what has met the condition often enough, as far as the guards allow."""
        config = self.config
        met, self.met = self.met, {}            # a listing that fails ends all runs in a row
        self.gone = []
        self.held.clear()
        self.promised = PromisedSpace(os.path.join(config.state_dir, 'promised.json'))
        if config.action == 'cull' and not self.dry_run:
            self.finish_removals()
        torrents = self.chosen()
        self.met = {torrent['hash']: met.get(torrent['hash'], 0) + 1 for torrent in torrents}
        confirm, limit = config.confirm, config.limit
        if self.dry_run:
            self.LOG.info('dry run: %d torrents meet the condition', len(torrents))
        if self.dry_run and config.alone:       # it shows what is done once enough runs agree
            confirm = 1
        if self.deletes and limit is None:
            limit = 10
        ready = []
        for torrent in torrents:
            if self.met[torrent['hash']] < confirm:
                self.hold_back([torrent],
                               f'it has not yet met the condition in {confirm} runs in a row')
            elif self.deletes and torrent['is_hashing']:
                # 0.9.8 may hang for good, and what is complete is not known.
                self.hold_back([torrent], 'it is being checked')
            else:
                ready.append(torrent)
        try:
            self.each(ready, self.perform, limit)
        finally:
            if config.until_free and not self.dry_run:
                self.promised.save()

    def perform(self, torrent: Torrent) -> bool:
        """Do the action on one torrent; tell whether there was anything to do."""
        action, commands = self.config.action, ACTION_COMMANDS[self.config.action][1]
        if action == 'cull':
            return self.cull(torrent)
        shown = self.template.render(torrent)
        calls = []
        if commands:
            calls = [(method, torrent['hash'], *rest)
                     for method, *rest in commands(torrent, shown)]
        elif action == 'exec':
            calls = [('branch', torrent['hash'], 'd.hash=', text)
                     for text in self.template.commands(torrent)]
        if not calls and action != 'log':
            self.LOG.debug('%s %s: nothing to do', action, torrent)
            return False
        if self.deletes and torrent['is_hashing']:      # since the run began
            raise LoggableError('it is being checked')
        if self.announce(action, torrent, shown and quoted(shown)) and calls:
            answers = self.engine.tell(calls)
            if self.deletes:
                answers = answers[-1:]                  # erased is erased
            without_errors(answers)
        return True

    # What follows is the action cull.

    def cull(self, torrent: Torrent) -> bool:
        """Erase an item and delete its data, unless anything about that is doubtful."""
        if self.is_enough(torrent['path']):
            free = show_size(self.config.until_free)
            self.hold_back([torrent], f'{free} are free without it')
            return False
        require_same_files(self.engine)
        if self.dry_run and not torrent['is_open']:
            self.announce('cull', torrent, CLOSED)
            self.promise(torrent['path'], torrent['d_completed_bytes'])
            return True
        with opened(self.engine, torrent['hash']) as (item, fresh):
            data = own_data(item, fresh)
            if not data.files and item.completed_bytes:
                raise LoggableError(f'there is no data at {quoted(data.root)}; the action delete '
                                    'is for an item without')
            data, why = self.without_users(item, data)
            for folder in {os.path.dirname(file.path) for file in data.files}:
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise LoggableError(f'nothing can be deleted in {quoted(folder)}')
            freed = freed_by(data)
            if self.config.until_free and not freed:
                self.hold_back([torrent], 'deleting it frees nothing')
                return False
            shown = f'with {len(data.files)} files at {quoted(data.root)}'
            if self.announce('cull', torrent, why or shown):
                self.erase_with_data(item, data, freed)
            else:
                self.gone.append(item.owner)
                self.promise(data.root, freed)
        return True

    def without_users(self, item: Item, data: OwnData) -> tuple[OwnData, str]:
        """Return the data that goes with an item, and why not all of it.

        Data that another item has in its own list, too, stays for that one. Where they only
        overlap the item is held back, for afterwards nobody would know of the rest.
        """
        if self.config.shared == 'delete' or not data.files:
            return data, ''
        users = Users(self.engines())
        others = users.of(data, [item.owner, *self.gone])
        for owner, path in others.items():
            if users.has_all(owner, data):
                return data._replace(files=[], folders=[]), \
                    f'alone, its data stays: another item uses {quoted(path)}'
        for path in others.values():
            raise LoggableError(f'another item may use its data: {quoted(path)}')
        return data, ''

    def erase_with_data(self, item: Item, data: OwnData, freed: int) -> None:
        """Write down what is going to be removed, erase the item, and delete the data."""
        device, free = disk_of(data.root)
        shared = self.config.shared == 'delete'
        removal = Removal.begin(self.config.state_dir, item, data, shared=shared)
        with contextlib.closing(removal):
            try:
                erase(item)
            except Unreachable:         # the note stays, and the next run asks again
                raise
            except RpcError:
                removal.drop()
                start_again(item)
                raise
            try:
                removal.mark('erased')
                self.delete(removal)
            except LoggableError as error:      # the item is gone, and counts
                self.failures.append(error)
                self.LOG.warning('%s', error)
        if device is not None and free is not None:
            self.promised.add(device, free, freed, time.time())

    def delete(self, removal: Removal) -> None:
        """Delete the data of a note, and the note; LoggableError where some cannot be deleted."""
        others = removal.remove_files()
        if others:
            self.LOG.warning('%d files at %s stay: they were changed meanwhile', others,
                             quoted(removal.data.root))
        removal.drop()

    def finish_removals(self) -> None:
        """Finish what earlier runs could not; while that fails, nothing more is deleted."""
        for removal in left_removals(self.config.state_dir, self.engine):
            if 'new' in removal.facts:          # it is of a Move
                continue
            root = quoted(removal.data.root)
            why = why_keep(removal, self.engine, self.engines())
            if why:
                self.LOG.warning('the data of %s at %s is kept: its removal was cut short, and %s',
                                 removal, root, why)
                removal.drop()
            else:
                require_same_files(self.engine)
                self.LOG.info('removing the rest of %s at %s', removal, root)
                self.delete(removal)

    def is_enough(self, path: str) -> bool:
        """Tell whether the disk of a path has what until_free asks for, with what is promised."""
        if not self.config.until_free:
            return False
        device, free = disk_of(path)
        if device is None or free is None:
            return True                 # what deleting would bring is not known
        owed = self.promised.owed(device, free, time.time())
        return free + owed >= self.config.until_free

    def promise(self, path: str, freed: int) -> None:
        """Count what deleting data at a path would free, in a dry run."""
        device, free = disk_of(path)
        if device is not None and free is not None:
            self.promised.add(device, free, freed, time.time())


class Command(Job):
    """Run a program."""
    children: set = set()               # pids of programs that run
    options: Any = (
        Option('args', str, '', 'program and arguments; quotes as in a shell'),
        Option('shell', parse_bool, 'no', 'args is a line for the shell'),
        Option('cwd', str, '', 'folder to run in'),
        Option('env', parse_pairs, '', 'more environment: NAME=value, NAME=value'),
        Option('timeout', parse_duration, '', 'when the program and its children are ended'),
        Option('check', parse_bool, 'yes', 'no: a status other than 0 is no failure'))

    def __init__(self, config: JobConfig):
        super().__init__(config)
        if not config.args:
            raise UserError('is not set', option='args')
        try:
            self.words = config.args if config.shell else shlex.split(config.args)
        except ValueError as error:
            raise UserError(f'{quoted(config.args)}: {error}', option='args') from None

    def run(self) -> None:
        self.execute(self.words, {})

    @classmethod
    def end_all(cls) -> None:
        """End the programs that still run, for torque ends."""
        for pid in list(cls.children):
            with contextlib.suppress(OSError):
                os.killpg(pid, 15)              # SIGTERM

    def execute(self, words: str | list[str], environment: dict) -> None:
        """Run the program once; its output goes to the log, a failure is raised."""
        import signal
        import subprocess
        import tempfile
        config = self.config
        shown = quoted(words if isinstance(words, str) else ' '.join(map(shlex.quote, words)))
        if self.dry_run:
            self.announce('running', shown)
            return
        self.LOG.debug('running %s', shown)     # further on without args: they may hold a password
        program = quoted(words.split()[0] if isinstance(words, str) else words[0])
        with tempfile.TemporaryFile() as output:        # a pipe may stay open in a grandchild
            try:
                process = subprocess.Popen(
                    words, shell=config.shell, cwd=os.path.expanduser(config.cwd) or None,
                    env={**os.environ, **environment, **config.env}, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            except (OSError, ValueError) as error:
                raise LoggableError(f'{program}: {error}') from None
            self.children.add(process.pid)
            try:
                status = f'status {process.wait(config.timeout or None)}'
            except BaseException as error:              # KeyboardInterrupt, too
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                        os.killpg(process.pid, number)
                        process.wait(3)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                status = f'force after {config.timeout:g} s'
            finally:
                self.children.discard(process.pid)
            output.seek(max(output.seek(0, os.SEEK_END) - 50000, 0))
            for line in output.read().decode('utf-8', 'replace').splitlines()[-100:]:
                self.LOG.info('%s', line[:500])
        if status != 'status 0':
            if config.check or 'force' in status:
                raise LoggableError(f'{program} ended with {status}')
            self.LOG.info('%s ended with %s', program, status)


class ItemCommand(Choice, Command):
    """Run a program for every torrent that meets a condition."""
    options = (
        *Choice.options, *Command.options,
        Option('once', parse_bool, 'no', 'only once for each torrent, which is marked'))
    fields = ENVIRONMENT = (
        'hash', 'name', 'path', 'directory', 'label', 'size', 'ratio', 'alias', 'message')

    def __init__(self, config: JobConfig):
        super().__init__(config)
        if not config.shell:
            self.template = self.use('args', ArgsTemplate, config.args)
        elif '{{' in config.args:
            raise UserError('args of a shell are no template: names must not reach it; write '
                            '"$TORRENT_NAME" ...')
        self.mark = 'torque_' + re.sub('[^A-Za-z0-9_-]', '_', config.job_name)
        if config.once:
            config['matcher'] = parse_condition(f'[ {config.matcher.text} ] custom_{self.mark}=')

    def run(self) -> None:
        self.each(self.chosen(), self.for_torrent)

    def for_torrent(self, torrent: Torrent) -> None:
        """Run the program for one torrent."""
        words = self.words if self.config.shell else self.template.render(torrent)
        self.execute(words, {f'TORRENT_{name.upper()}': show(torrent[name]).replace('\0', ' ')
                             for name in self.ENVIRONMENT})
        if self.config.once and not self.dry_run:
            proxy = self.engine.open()
            proxy.d.custom.set(torrent['hash'], self.mark, '1')
            proxy.d.save_full_session(torrent['hash'])


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
    PAUSES = (60, 3600)                 # seconds, after the first failure and at most

    def __init__(self, config: JobConfig):
        super().__init__(config)
        if not config.target:
            raise UserError('is not set', option='target')
        self.template = self.use('target', Template, config.target)
        # 0.9.8 aborts over more than 10 tracker requests of an item in 10 s, and each try makes
        # some. hash -> until when it is left alone, and for how long, in elapsed seconds
        self.pauses: dict[str, tuple[float, float]] = {}

    def run(self) -> None:
        """Move what meets the condition, after what an ended run has left."""
        if not self.dry_run:
            for removal in left_removals(self.config.state_dir, self.engine):
                if 'new' in removal.facts and not self.is_paused(removal.facts['hash']):
                    self.take_up(removal)
        self.each(self.chosen(), self.move)

    def is_paused(self, info_hash: str) -> bool:
        """Tell whether an item is left alone after a failure."""
        until, _ = self.pauses.get(info_hash, (0, 0))
        return elapsed_time() < until

    def pause(self, info_hash: str) -> None:
        """Leave an item alone, after every failure for longer."""
        _, last = self.pauses.get(info_hash, (0, 0))
        first, most = self.PAUSES
        seconds = min(max(2 * last, first), most)
        self.pauses[info_hash] = elapsed_time() + seconds, seconds

    def move(self, torrent: Torrent) -> bool:
        """Move one item, unless anything about that is doubtful."""
        folder = os.path.expanduser(self.template.render(torrent))
        if not folder or self.is_paused(torrent['hash']):
            return False
        if not os.path.isabs(folder) or '..' in folder.split('/') or '\0' in folder:
            raise LoggableError(f'target {quoted(folder)} is no absolute path')
        folder = os.path.normpath(folder)
        place = identity(folder)
        if place and place == identity(os.path.dirname(torrent['path'])):
            return False
        require_same_files(self.engine)
        if self.dry_run and not torrent['is_open']:
            return self.announce('moving', torrent, 'to', quoted(folder), CLOSED)
        with opened(self.engine, torrent['hash']) as (item, fresh):
            data = own_data(item, fresh)
            root = quoted(data.root)
            if place and place == identity(os.path.dirname(data.root)):
                return False
            target = os.path.join(folder, os.path.basename(data.root))
            try:
                self.check(item, data, target)
            except LoggableError as error:
                raise LoggableError(f'not moved: {error}') from None
            if self.announce('moving', torrent, 'from', root, 'to', quoted(folder)):
                if fresh:
                    item = item._replace(is_open=0)     # as it shall be afterwards
                self.carry_out(item, data, target)
        return True

    def check(self, item: Item, data: OwnData, target: str) -> None:
        """Raise LoggableError where an item is better not moved."""
        if not data.files:
            raise LoggableError(f'there is no data at {quoted(data.root)}')
        for file in item.files:
            if file.size_bytes and file.completed_chunks and not file.is_created:
                raise LoggableError(f'{quoted(file.frozen_path)} is not there')
        folder = os.path.dirname(target)
        above = folder
        while above != os.path.dirname(above):
            if identity(above) == identity(data.root):
                raise LoggableError(f'{quoted(folder)} lies in it')
            above = os.path.dirname(above)
        users, there = Users(self.engines()), self.data_at(data, target)
        for part in (data, there):
            for path in users.of(part, [item.owner]).values():
                raise LoggableError(f'another item uses {quoted(path)}')
        if not os.path.lexists(target):
            require_room(data, folder)
        elif len(there.files) < len(data.files):
            raise LoggableError(f'{quoted(target)} exists: nothing is overwritten')

    @staticmethod
    def data_at(data: OwnData, target: str) -> OwnData:
        """Return those files of data that are at the target, too, and have the same size."""
        files = []
        for file in data.files:
            path = target + file.path[len(data.root):]
            with contextlib.suppress(OSError):
                status, size = os.lstat(path), os.lstat(file.path).st_size
                if stat.S_ISREG(status.st_mode) and status.st_size == size:
                    files.append(OwnFile(path, status.st_dev, status.st_ino))
        return OwnData(target, files, [])

    def carry_out(self, item: Item, data: OwnData, target: str) -> None:
        """Close an item, bring its data to the target, tell rTorrent, open and start it again."""
        folder = os.path.dirname(target)
        make_folders(folder)
        copy = make_empty(os.path.join(folder, f'.torque-{item.hash}'))
        new = folder
        if item.is_multi_file:
            new = target
        try:
            removal = Removal.begin(
                self.config.state_dir, item, data, new=new, target=target, copy=copy,
                copy_identity=identity(copy), state=item.state, is_open=item.is_open)
        except BaseException:
            os.rmdir(copy)
            raise
        with contextlib.closing(removal):
            try:
                self.bring(item, removal)
            except BaseException:
                self.undo(item, removal)
                raise
            self.finish(item, removal)

    def bring(self, item: Item, removal: Removal) -> None:
        """Have the data at the target, and rTorrent use it there."""
        data, new, target = removal.data, removal.facts['new'], removal.facts['target']
        item.tell(('d.close',))         # d.state stays as it is
        if os.path.lexists(target):
            for file in data.files:
                if not same_content(file.path, target + file.path[len(data.root):]):
                    raise LoggableError(f'{quoted(target)} exists: nothing is overwritten')
        else:
            made = self.made(removal)
            copy_data(data, made)
            if ask_item(self.engine, item.hash).is_open:
                raise LoggableError('it was opened while its data was copied')
            rename_new(made, target)
            removal.mark('copied')
        item.tell(('d.directory_base.set', new))
        if ask_item(self.engine, item.hash).directory_base != new:
            raise LoggableError(f'rTorrent took {quoted(new)} for something else')
        self.open_data(item, removal)
        item.tell(('d.save_full_session',))

    @staticmethod
    def made(removal: Removal) -> str:
        """Return the root of the copy in the temporary folder."""
        return os.path.join(removal.facts['copy'], os.path.basename(removal.data.root))

    def open_data(self, item: Item, removal: Removal) -> None:
        """Have rTorrent open an item; LoggableError where it does not find all files."""
        item.tell(('d.open',))
        now = ask_item(self.engine, item.hash)
        if sum(file.is_created for file in now.files) < len(removal.data.files):
            target = quoted(removal.facts['target'])
            raise LoggableError(f'rTorrent cannot open the data at {target}: it stays at the old '
                                'place, too')

    def undo(self, item: Item, removal: Removal) -> None:
        """Have an item use its old place again, and remove what was made at the new one.

        Where rTorrent is away all stays as it is, for the next run.
        """
        self.pause(item.hash)
        item.tell(('d.close',), ('d.directory_base.set', item.directory_base))
        if 'copied' in removal.steps:
            os.rename(removal.facts['target'], self.made(removal))
        self.discard_copy(removal)
        start_again(item)
        removal.drop()

    @staticmethod
    def discard_copy(removal: Removal) -> None:
        """Delete the temporary folder of a move, if it is still that one."""
        copy = removal.facts['copy']
        if identity(copy) == tuple(removal.facts['copy_identity']):
            discard(copy)

    def finish(self, item: Item, removal: Removal) -> None:
        """Remove the files of an item at its old place, which are at the new one, too."""
        data, target = removal.data, removal.facts['target']
        self.discard_copy(removal)
        left = [file for file in data.files if os.path.lexists(file.path)]
        try:
            why = ''
            if len(self.data_at(data._replace(files=left), target).files) < len(left):
                why = f'{quoted(target)} does not have all of it'
            for path in Users(self.engines()).of(data, [item.owner]).values():
                why = f'another item uses {quoted(path)}'
            if why:
                self.LOG.warning('%s stays, too: %s', quoted(data.root), why)
            else:
                removal.remove_files()
        except BaseException:
            self.pause(item.hash)
            raise
        finally:
            start_again(item)
        self.pauses.pop(item.hash, None)
        removal.drop()

    def take_up(self, removal: Removal) -> None:
        """Finish a move that an ended run has begun, or undo it where rTorrent was not told."""
        facts, item = removal.facts, None
        with contextlib.suppress(HashNotFound):
            item = ask_item(self.engine, facts['hash'])
        if item is None or item.session != facts['session']:
            self.LOG.warning('the data of %s stays at %s: its move was cut short, and rTorrent '
                             'does not have it any more', removal, quoted(removal.data.root))
            self.discard_copy(removal)
            removal.drop()
            return
        require_same_files(self.engine)
        told = item.absolute(item.directory_base) == facts['new']
        item = item._replace(state=facts['state'], is_open=facts['is_open'])
        if told:
            self.LOG.info('finishing the move of %s to %s', removal, quoted(facts['target']))
            self.open_data(item, removal)
            self.finish(item, removal)
        else:
            self.LOG.info('the move of %s was cut short; it is started again at its old place',
                          removal)
            self.discard_copy(removal)
            start_again(item)
            removal.drop()


class Inotify:
    """Changes in folders, told by Linux; raises OSError where that does not work."""
    ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE = 0x4, 0x8, 0x40, 0x80, 0x100
    MOVE_SELF, OVERFLOW, IGNORED, ONLYDIR, ISDIR = 0x800, 0x4000, 0x8000, 0x1000000, 0x40000000

    def __init__(self) -> None:
        import ctypes
        self.ctypes, self.libc = ctypes, ctypes.CDLL(None, use_errno=True)
        self.folders: dict[int, str] = {}       # by the number of the watch
        self.stream = open(self.call('inotify_init1', os.O_NONBLOCK | os.O_CLOEXEC), 'rb', 0)

    def call(self, name: str, *args: Any) -> int:
        """Return what a system call gives."""
        result = getattr(self.libc, name)(*args)
        if result < 0:
            raise OSError(self.ctypes.get_errno(), os.strerror(self.ctypes.get_errno()))
        return result

    def add(self, folder: str) -> None:
        """Watch one folder; one that is watched already by another name goes by this one."""
        mask = (self.ATTRIB | self.CLOSE_WRITE | self.MOVED_FROM | self.MOVED_TO | self.CREATE
                | self.MOVE_SELF | self.ONLYDIR)        # ATTRIB: it may be readable now
        self.folders[self.call('inotify_add_watch', self.stream.fileno(), os.fsencode(folder),
                               mask)] = folder

    def forget(self, folder: str) -> None:
        """Watch a folder and what is below it no longer; this wakes who waits for events."""
        for watch, path in list(self.folders.items()):
            if os.path.join(path, '').startswith(os.path.join(folder, '')):
                self.libc.inotify_rm_watch(self.stream.fileno(), watch)
                self.folders.pop(watch, None)

    def close(self) -> None:
        """Watch nothing any more."""
        self.folders.clear()
        self.stream.close()

    def events(self) -> Iterator[tuple[int, str]]:
        """Give (mask, path) of what happened; the path of an overflow is empty.

        IGNORED: a folder that was watched is gone.
        """
        content, at = self.stream.read(1 << 16) or b'', 0
        while at < len(content):
            watch, mask, _, length = struct.unpack_from('iIII', content, at)
            name = content[at + 16:at + 16 + length].rstrip(b'\0')
            at += 16 + length
            folder = self.folders.pop(watch, '') if mask & self.IGNORED else \
                self.folders.get(watch, '')
            if folder or mask & self.OVERFLOW:
                yield mask, os.path.join(folder, os.fsdecode(name)) if name else folder


def parse_mode(text: str) -> str:
    """Return how new items are loaded: normal or start."""
    if text.lower() not in ('', 'normal', 'load', 'start', 'started'):
        raise UserError(f'{text!r} is no mode; allowed are normal and start')
    return 'start' if text.lower().startswith('start') else 'normal'


class TreeWatch(Job):
    """Load metafiles that appear in trees of folders.

    What a look through the trees or an event finds goes into `waiting`, as does a root that is
    not there; work() handles it.
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
        Option('trace_inotify', parse_bool, 'no', 'log every event'),
        Option('cmd.NAME', str, '', 'command for the new item, a template; cmd_NAME too'))
    at_start = True
    families = ('cmd.', 'cmd_')
    ENDINGS = ('.torrent', '.load', '.start', '.queue')
    RETRY = 5                           # seconds between looks at files that wait
    NAMES = frozenset('pathname relpath rel_path watch_path info_hash info_name tracker_alias '
                      'filetype label traits flags'.split())

    @staticmethod
    def folders(config: Any) -> list[str]:
        """Return the folders that a configuration names."""
        return [os.path.abspath(os.path.expanduser(path.strip()))
                for path in config.path.split(os.pathsep) if path.strip()]

    def __init__(self, config: JobConfig):
        super().__init__(config)
        self.roots = self.folders(config)
        if not self.roots:
            raise UserError('is not set', option='path')
        for root in self.roots:
            if not os.path.isdir(root):
                raise UserError(f'{root!r} is not a folder', option='path')
        self.commands = []
        for key in sorted(key for key in config if key.startswith(self.families)):
            with reading(key):
                self.commands.append(CommandTemplate(config[key], self.NAMES))
        self.lock = threading.Lock()            # run() and the watching thread take turns
        self.done: dict[str, Any] = {}          # path -> stamp of a file that is dealt with
        self.waiting: dict[str, float] = {}     # path -> when to look at it, monotonic seconds
        self.by_path = None if self.engine.address.is_local() else False    # None: not known
        self.use_inotify = config.inotify and not config.alone
        self.inotify: Inotify | None = None
        self.thread: threading.Thread | None = None
        self.ended = False

    def run(self) -> None:
        """Look through the trees, and see to it that changes are watched."""
        with self.lock:
            if self.use_inotify and (not self.inotify or self.inotify.stream.closed):
                try:
                    self.inotify = Inotify()
                    self.thread = threading.Thread(target=self.watch, args=(self.inotify,),
                                                   daemon=True)
                    self.thread.start()
                except (ImportError, AttributeError, OSError, RuntimeError) as error:
                    self.LOG.warning('no inotify, files are found on schedule only: %s', error)
                    if self.inotify:
                        self.inotify.close()
                    self.use_inotify, self.inotify = False, None
            trouble = self.look()
            self.work()
        if trouble:
            raise LoggableError(trouble)

    def cleanup(self) -> None:
        """End the watching thread."""
        self.ended = True
        if self.inotify and self.thread:
            if self.lock.acquire(timeout=5):    # else it is in a call, and will see `ended`
                self.inotify.forget(os.sep)
                self.lock.release()
            self.thread.join(5)

    def watch(self, inotify: Inotify) -> None:
        """Handle files as they appear, and those that wait; a thread, while there are watches."""
        poll = select.poll()
        poll.register(inotify.stream.fileno(), select.POLLIN)
        timeout: float | None = 0.0
        while not inotify.stream.closed:
            poll.poll(timeout)
            with self.lock, contextlib.ExitStack() as close_unless_all_went_well:
                close_unless_all_went_well.callback(inotify.close)
                for mask, path in inotify.events():
                    self.see(inotify, mask, path)
                with contextlib.suppress(RpcError):             # the engine has told it
                    self.work()
                due = min(self.waiting.values(), default=None)
                timeout = None if due is None else max(due - time.monotonic(), 0) * 1000 + 1
                if (inotify.folders or self.waiting) and not self.ended:
                    close_unless_all_went_well.pop_all()

    def see(self, inotify: Inotify, mask: int, path: str) -> None:
        """Note what one event of inotify tells."""
        if self.config.trace_inotify:
            self.LOG.info('inotify %#x %s', mask, quoted(path))
        trouble = ''
        if mask & Inotify.OVERFLOW:
            self.LOG.info('too many changes at once for inotify: looking through everything')
            trouble = self.look()
        elif mask & (Inotify.IGNORED | Inotify.MOVE_SELF):
            if path in self.roots and path not in self.waiting:
                inotify.forget(path)            # it is a folder elsewhere now, or none
                self.waiting[path] = time.monotonic() + self.RETRY
                trouble = f'{quoted(path)} is gone; it is watched again when it is back'
        elif mask & Inotify.ISDIR and mask & Inotify.MOVED_FROM:
            inotify.forget(path)
        elif mask & Inotify.ISDIR:
            trouble = self.scan([path])
        elif not mask & Inotify.MOVED_FROM:
            self.note(path)
        if trouble:
            self.LOG.warning('%s', trouble)

    def look(self) -> str:
        """Note all files of the trees, watch all folders anew; return what cannot be read."""
        if self.inotify:
            self.inotify.forget(os.sep)         # also what was moved away unseen
        self.waiting.clear()
        trouble = self.scan(self.roots)
        self.done = {path: stamp for path, stamp in self.done.items() if path in self.waiting}
        return trouble

    def scan(self, folders: list[str]) -> str:
        """Note the files below folders, which are watched from before they are read."""
        left = folders[:]
        trouble: dict[str, str] = {}            # one folder for each reason is enough

        def failed(error: OSError) -> None:
            """Note why a folder cannot be watched or read."""
            why = 'too many inotify watches' if error.errno == errno.ENOSPC else \
                str(error.strerror)
            if folder in self.roots or error.errno not in (errno.ENOENT, errno.ENOTDIR):
                trouble.setdefault(why, f'{quoted(folder)} cannot be watched or read: {why}')
            if folder in self.roots and not os.path.isdir(folder):
                self.waiting[folder] = time.monotonic() + self.RETRY

        for folder in left:                     # it grows meanwhile
            try:
                if self.inotify:
                    self.inotify.add(folder)
            except OSError as error:            # the schedule finds its files
                failed(error)
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            left.append(entry.path)
                        else:
                            self.note(entry.path)
            except OSError as error:
                failed(error)
        return '; '.join(trouble.values())

    def note(self, path: str) -> None:
        """Let work() handle a file, if its name is one of a metafile."""
        if path.lower().endswith(self.ENDINGS):
            self.waiting[path] = 0.0

    def work(self) -> None:
        """Handle the files that are due; raises Unreachable when rTorrent is away."""
        now = time.monotonic()
        for path in sorted(path for path, due in self.waiting.items() if due <= now):
            if self.ended:
                return
            del self.waiting[path]
            try:
                if path not in self.roots:
                    self.handle(path)
                elif os.path.isdir(path):
                    self.LOG.info('%s is there again', quoted(path))
                    self.scan([path])
                else:
                    self.waiting[path] = time.monotonic() + self.RETRY
            except Unreachable:
                self.waiting = dict.fromkeys([path, *self.waiting], time.monotonic() + self.RETRY)
                raise

    def handle(self, path: str) -> None:
        """Load a file if it is a new metafile; one that may be half-written waits."""
        stamp: Any = None
        try:
            found = os.stat(path)
            stamp = found.st_ino, found.st_ctime_ns, found.st_size
            if self.done.get(path) != stamp:
                self.load(path, read_metafile(path))
        except (FileNotFoundError, NotADirectoryError):
            self.done.pop(path, None)
            return
        except OSError as error:
            stamp = stamp or error.errno
            if self.done.get(path) != stamp:
                self.LOG.warning('%s: %s', quoted(path), error.strerror)
        except ValueError as error:
            if abs(time.time() - found.st_mtime) < 2 * self.RETRY and not self.config.alone:
                self.waiting[path] = time.monotonic() + self.RETRY
                return
            self.LOG.warning('%s is no metafile: %s', quoted(path), error)
        except Unreachable:
            raise
        except LoggableError as error:
            self.LOG.warning('%s is not loaded: %s', quoted(path), error)
        except Exception:
            self.LOG.exception('%s is not loaded', quoted(path))
        self.done[path] = stamp

    def values(self, path: str, meta: Metafile) -> dict[str, Any]:
        """Return what templates know of a file."""
        folder, base = os.path.split(path)
        root = max((root for root in self.roots if lies_in(path, root)), key=len, default=folder)
        relative = os.path.relpath(folder, root)
        kind = os.path.splitext(meta.main_file)[1]
        traits = name_traits(meta.name, kind[1:].lower())
        return {
            'pathname': path, 'watch_path': root, 'rel_path': relative,
            'relpath': '' if relative == '.' else relative,
            'info_hash': meta.info_hash, 'info_name': meta.name, 'filetype': kind,
            'tracker_alias': meta.tracker and tracker_alias(meta.tracker, self.engine.aliases),
            'flags': {*path.split(os.sep), *base.split('.')} - {''}, 'traits': traits,
            'label': traits['kind'] and f"{traits['kind']}/{kind[1:]}".strip('/')}

    def plan(self, path: str, meta: Metafile) -> tuple[str, list[str], dict]:
        """Return for a file: queued, started or nothing; commands; the template's values."""
        values, config = self.values(path, meta), self.config
        flags = set(map(str.lower, values['flags']))
        start = 'start' in flags or 'load' not in flags and (
            config.started or config.load_mode == 'start')
        commands = [command for template in self.commands
                    for command in template.commands(values)]
        if not config.queued and 'queue' not in flags:
            return 'started' if start else '', commands, values
        return 'queued', commands + ['d.priority.set=0'] * (not start), values

    def load(self, path: str, meta: Metafile) -> None:
        """Load a metafile unless its item is there, and wait for that."""
        proxy, name = self.engine.open(), quoted(meta.name)
        how, commands, _ = self.plan(path, meta)
        with contextlib.suppress(HashNotFound):
            file = os.path.expanduser(proxy.d.tied_to_file(meta.info_hash))
            tied, ours = (re.sub(r'(%[0-9A-F]{2}|[^ -~]|\?)+', '?', text)   # as rTorrent has it
                          for text in (file, path))
            if tied != ours and os.path.realpath(file) != os.path.realpath(path):
                self.LOG.info('%s: %s is loaded already', quoted(path), name)
                gone = file and not os.path.exists(file)
                if self.config.remove_already_added and not gone and (  # else this may be the last
                        self.announce('removing', quoted(path))):
                    os.remove(path)
            return
        shown = f' [{how}]' if how else ''
        if self.dry_run:
            self.announce('loading', name, 'from', quoted(path) + shown)
            return
        self.send(proxy, path, meta, how == 'started', commands)
        self.LOG.info('loaded %s from %s%s', name, quoted(path), shown)
        message = proxy.d.message(meta.info_hash) if commands else ''
        if 'creation failed' in message:        # a command was wrong; the item is there
            self.LOG.warning('%s: %s', name, quoted(message))
        if self.config.print_to_client and not self.config.quiet:
            with contextlib.suppress(RpcError):
                proxy.print('', f'torque: loaded {ascii(meta.name)} from {ascii(path)}{shown}')

    def send(self, proxy: Proxy, path: str, meta: Metafile, start: bool, texts: list) -> None:
        """Load by path where rTorrent sees the file, else by content; wait for the item."""
        if not all(re.fullmatch('[ -\ud7ff]*', text) for text in (path, *texts)):
            path, *texts = (text.encode('utf-8', 'surrogateescape') for text in (path, *texts))
            proxy = Proxy(self.engine.send, self.engine.address.where, False, self.engine.notice)
        patience = 1 + len(meta.content) / 5e6
        pattern = re.search(r'[*?[]', os.fsdecode(path))        # rTorrent would look for others
        by_path = self.by_path is not False and not pattern
        if by_path:
            (proxy.load.start if start else proxy.load.normal)('', path, *texts)
            if self.appears(proxy, meta.info_hash, patience):
                self.by_path = True
                return
        try:
            (proxy.load.raw_start if start else proxy.load.raw)('', meta.content, *texts)
        except Unreachable:
            if len(meta.content) > 100000:
                proxy.system.pid('')            # is it away, or was this too much for it?
                raise LoggableError(f'{show_size(len(meta.content))} are more than rTorrent takes '
                                    'in one request') from None
            raise
        if not self.appears(proxy, meta.info_hash, patience):
            raise LoggableError('rTorrent did not take it, and does not say why'
                                + ('' if meta.tracker else '; it has no tracker: is DHT off?'))
        if by_path and self.by_path is None:
            self.by_path = False                # it sees other files than torque does
        if pattern and self.by_path:            # so that it goes with its item, as others do
            proxy.d.tied_to_file.set(meta.info_hash, path)
            proxy.d.save_full_session(meta.info_hash)

    @staticmethod
    def appears(proxy: Proxy, item: str, seconds: float) -> bool:
        """Tell whether an item comes up in time."""
        end, pause = time.monotonic() + seconds, 0.0002
        while True:
            with contextlib.suppress(HashNotFound):
                proxy.d.hash(item)
                return True
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    def explain(self, path: str) -> list[str]:
        """Return lines that tell what would be done with a metafile."""
        path = os.path.abspath(path)
        try:
            if not path.lower().endswith(self.ENDINGS):
                raise ValueError(f"its name ends in none of {' '.join(self.ENDINGS)}")
            meta = read_metafile(path)
            how, commands, values = self.plan(path, meta)
        except (OSError, ValueError, LoggableError) as error:
            return [f'{path} is not loaded: {error}']
        place = '' if values['watch_path'] in self.roots else ' (if it lay below path)'
        there = ''
        with contextlib.suppress(RpcError):
            self.engine.open().d.hash(meta.info_hash)
            there = '; but it is loaded already'
        values['flags'] = sorted(values['flags'])
        return [f"{path}: {how or 'loaded, not started'}{place}{there}",
                *(f'  {name} = {value!r}' for name, value in sorted(values.items())),
                *(f'  command {command}' for command in commands)]


# --- Config ----------------------------------------------------------------------------------
# torque.ini becomes entries (value and place), entries become settings, settings become jobs.
# Every mistake is collected as one line `file:line: setting: what is wrong; what is allowed`;
# only when there is none does anything start. config_ini is the configuration as jobs see it.

DEFAULTS = {                            # jobs under those of the ini: handler, schedule, active
    'connstats': ('torque:EngineStats', 'minute=*', 'yes'),
    'fluxstats': ('torque:InfluxDB', 'second=*/15', 'no'),
    'queue': ('torque:QueueManager', 'second=*/15', 'no'),
    'treewatch': ('torque:TreeWatch', 'hour=*', 'no')}
HANDLERS = {                            # names that pyrocore and pyrosimple have for our jobs
    f'{package}.{name}': f'torque:{ours}'
    for package in ('pyrocore.torrent', 'pyrocore.job', 'pyrosimple.torrent', 'pyrosimple.job')
    for name, ours in {
        'jobs:EngineStats': 'EngineStats', 'metrics:EngineStats': 'EngineStats',
        'jobs:InfluxDBStats': 'InfluxDB', 'jobs:InfluxDB': 'InfluxDB',
        'queue:QueueManager': 'QueueManager', 'watch:QueueManager': 'QueueManager',
        'watch:TreeWatch': 'TreeWatch',
        'action:Action': 'Action', 'action:Command': 'Command',
        'action:ItemCommand': 'ItemCommand', 'move_path:PathMover': 'Move'}.items()}
BUILT_IN = {f'torque:{name}': job for name, job in list(globals().items())
            if isinstance(job, type) and issubclass(job, Job) and hasattr(job, 'run')}
SECTIONS = ('TORQUE', 'INFLUXDB', 'ANNOUNCE')


def origin(error: BaseException) -> str:
    """Return one line that says what was raised and in which line of which file."""
    place, trace = '', error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith('<') and file != __file__:
            place = f'{file}:{trace.tb_lineno}: '
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        return f'{error.filename}:{error.lineno}: {error.msg}'
    return f'{place}{type(error).__name__}: {error}'


def required(text: str) -> str:
    """Return the text of what every job needs."""
    if not text:
        raise UserError('is missing; a job needs a handler and a schedule')
    return text


def import_handler(text: str) -> Any:
    """Return the class that `module.path:ClassName` names."""
    text = required(text).replace('::', ':')
    if not re.fullmatch(r'[^\W\d][\w.]*:\w+', text):
        raise UserError(f'{text!r} is no handler; allowed is module.path:ClassName')
    module, name = HANDLERS.get(text, text).split(':')
    import importlib
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:    # whatever the module does when imported
        if isinstance(error, ModuleNotFoundError) and error.name and (
                module == error.name or module.startswith(error.name + '.')):
            hint = f'; write {module[:-3]}:{name}' if module.endswith('.py') else \
                nearest(text, BUILT_IN)
            raise UserError(f'there is no module {error.name!r} (looked beside the ini and where '
                            f'Python does){hint}') from None
        raise UserError(f'module {module!r} cannot be imported: {origin(error)}') from None
    if not callable(getattr(found, name, None)):
        classes = [other for other in dir(found) if isinstance(getattr(found, other), type)]
        raise UserError(f'module {module!r} has no class {name!r}{nearest(name, classes)}')
    return getattr(found, name)


def parse_due(text: str) -> Schedule:
    """Return the Schedule of a job: one that is due again."""
    schedule = parse_schedule(required(text))
    if schedule.next(time.time()) is None:
        raise UserError(f'{text!r} lies in the past: it would never fire')
    return schedule


def parse_level(text: str) -> str:
    """Return a level of the log, or nothing."""
    if text.upper() not in ('', 'DEBUG', 'INFO', 'WARNING', 'ERROR'):
        raise UserError(f'{text!r}; allowed are DEBUG INFO WARNING ERROR')
    return text


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
    Option('rpc_timeout', parse_duration, '30s', 'most time for one call to rTorrent'),
    Option('rpc_limit', parse_size, '256m', 'largest answer of rTorrent that is read'),
    Option('grace', parse_duration, '10s', 'time for runs in progress at the end'),
    Option('state_dir', str, '', 'folder for what must survive a restart'),
    Option('pid_file', str, '', 'left out, torque.pid in state_dir'),
    Option('log_file', str, '', 'log in the background; left out, torque.log in state_dir'),
    Option('ping_url', parse_ping_url, '', 'monitor of all jobs that do not name one'),
    Option('queue_startable_base', parse_condition, 'is_open=no is_active=no is_complete=no',
           'condition that any startable item of a queue must meet'))
TORQUE_NAMES = [option.name for option in TORQUE_OPTIONS]


class Entry(NamedTuple):
    """A value in the ini, and where it stands, as file:line."""
    value: str
    place: str


class UnknownJob(UserError):
    """A job is named on the command line that the configuration does not have."""


class Mistakes(UserError):
    """All that is wrong with a configuration, a line each."""

    def __init__(self, lines: list[str]):
        def number(line: str) -> list[int]:
            return [int(digits) for digits in re.findall(r'^[^:]*:(\d+): ', line)]
        self.lines = [one_line(line) for line in sorted(dict.fromkeys(lines), key=number)]
        super().__init__('\n'.join(self.lines))


class Ini:
    """The entries of configuration files by section and key, mistakes, and warnings."""

    def __init__(self) -> None:
        self.sections: dict[str, dict[str, Entry]] = {'TORQUE': {}}
        self.mistakes: list[str] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []

    @staticmethod
    def excerpt(text: str, line: str) -> str:
        """Return part of a line as a message may show it."""
        return '***' if re.search(SECRET, line) else quoted(redacted(text.strip()), 60)

    def read(self, lines: Iterable[str], name: str) -> None:
        """Add the entries of one file, by the rules of pyrocore's parser.

        configparser knows no lines, and cuts comments from the wrong ones.
        """
        section = key = ''
        indent: int | None = None               # of the last key: what stands deeper goes on it
        found: dict = {}                        # (section, key) -> [value, place]
        for number, line in enumerate(lines, 1):
            line, place = line.replace('\ufeff', '').rstrip(), f'{name}:{number}'
            text, depth = line.lstrip(), len(line) - len(line.lstrip())
            deeper = indent is not None and depth > indent
            if not text or line[0] in '#;' or text[0] in '#;' and not deeper:
                continue
            if deeper:
                if key:                         # else it goes on a line that was refused
                    found[section, key][0] += '\n' + text
                    if re.match(rf"(job\.[\w.-]+|{'|'.join(TORQUE_NAMES)}) *[=:]", text):
                        self.warnings.append(f'{place}: an indented line belongs to the value '
                                             f'above it: {self.excerpt(text, line)}')
                continue
            cut = re.search(r'\s;', text)
            header = re.match(r'\[([^]]+)\]', text)
            entry = re.match(r'([^=:[][^=:]*)[=:](.*)', text[:cut.start()] if cut else text)
            if header:
                section, key, indent = header[1].upper(), '', None
            elif not section or not entry:
                self.mistakes.append(f'{place}: {self.excerpt(text, line)} ' + (
                    'is neither KEY = VALUE nor [SECTION]' if section or text[0] == '['
                    else 'stands before any [SECTION]; settings belong under [TORQUE]'))
                section, key, indent = section or '?', '', depth
            else:
                if cut and '=' in text[cut.end():]:
                    self.warnings.append(f'{place}: text after `;` is a comment: '
                                         f'{self.excerpt(text[cut.end():], line)}')
                key, indent = entry[1].strip(), depth
                if (section, key) in found:
                    self.warnings.append(f'{place}: {key} stands here again, and this one counts, '
                                         f'not that of {found[section, key][1]}')
                found[section, key] = [entry[2].strip(), place]
        for (section, key), (value, place) in found.items():
            self.add(section, key, '' if value == '""' else value, place)

    def add(self, section: str, key: str, value: str, place: str) -> None:
        """Add one entry; a later one replaces an earlier one."""
        if re.search(r'%\(\w+\)s', value.replace('%%', '')):
            self.mistakes.append(f'{place}: {key}: {self.excerpt(value, key)}: nothing is '
                                 'interpolated; write the value itself, and %% for %')
        self.sections.setdefault(section, {})[key] = Entry(value.replace('%%', '%'), place)

    def warn_if_near(self, word: str, known: Iterable[str], place: str, text: str) -> None:
        """Warn of something without an effect where it looks like a slip."""
        close = nearest(word, known)
        if close:
            self.warnings.append(f'{place}: {text}{close}')


def convert(text: str) -> Any:
    """Return a value as pyrocore's jobs expect it: digits as int, words of truth as bool.

    >>> convert('12'), convert('No'), convert('text')
    (12, False, 'text')
    """
    if re.fullmatch('[0-9]{1,4000}', text):     # Python refuses to convert more
        return int(text)
    return parse_bool(text) if text.lower() in 'true yes on false no off'.split() else text


class PlannedJob(NamedTuple):
    """A job that can be made; place is where the user's file speaks of it."""
    name: str
    make: Callable[[JobConfig], Any]
    config: JobConfig
    schedule: Schedule
    places: dict[str, str]              # of its settings, and '' of the first
    source: dict[str, str]              # all texts it is made of: the same, and so is the job


def beside(path: str, name: str | None) -> str:
    """Return where a file named in a configuration is: a relative name is beside it."""
    folder = os.path.dirname(os.path.realpath(path))
    return os.path.join(folder, os.path.expanduser(name)) if name else ''


def default_state_dir(path: str) -> str:
    """Return the folder of state of one configuration file, by its real path."""
    import hashlib
    real = os.path.realpath(path)
    base = os.environ.get('XDG_STATE_HOME') or os.path.expanduser('~/.local/state')
    mark = hashlib.sha256(real.encode('utf-8', 'surrogateescape')).hexdigest()[:8]
    return os.path.join(base, 'torque', f'{os.path.basename(real)}-{mark}')


def read_files(path: str, overrides: Iterable[str]) -> Ini:
    """Return the entries of the defaults, of the user's file over them, and of -D over both."""
    ini = Ini()
    for name, values in DEFAULTS.items():
        for key, value in zip(('handler', 'schedule', 'active'), values):
            ini.add('TORQUE', f'job.{name}.{key}', value, '<defaults>')
    try:
        with open(path, encoding='utf-8') as stream:
            ini.read(stream, path)
    except UnicodeDecodeError as error:
        raise Mistakes([f'{path}: not UTF-8 text: {error.reason} at byte {error.start}']) from None
    except OSError as error:
        raise Mistakes([f'{path}: {error.strerror}']) from None
    for text in overrides:
        key, equals, value = text.partition('=')
        shown = ini.excerpt(text, text)
        section, dot, rest = key.strip().partition('.')
        if not equals or not key.strip():
            ini.mistakes.append(f'-D {shown}: allowed is KEY=VALUE or section.KEY=VALUE')
        elif dot and section.upper() in {*ini.sections, *SECTIONS}:
            ini.add(section.upper(), rest, value.strip(), '-D')
        elif dot and section.lower() not in ('job', 'apscheduler', 'httpd'):
            ini.mistakes.append(f'-D {shown}: there is no section [{section.upper()}]')
        else:
            ini.add('TORQUE', key.strip(), value.strip(), '-D')
    return ini


def first_place(entries: dict[str, Entry]) -> str:
    """Return where the user's file begins to speak of something."""
    return next((entry.place for entry in entries.values() if entry.place != '<defaults>'),
                '<defaults>')


def group_jobs(ini: Ini) -> dict[str, dict[str, Entry]]:
    """Return the entries of each job by name; tell of those that torque has no use for."""
    groups: dict[str, dict[str, Entry]] = {}
    ignored = set()
    for key, entry in ini.sections['TORQUE'].items():
        stem, _, rest = key.partition('.')
        name, _, param = rest.partition('.')
        if stem == 'job' and name and param:
            groups.setdefault(name, {})[param] = entry
        elif stem == 'job':
            ini.mistakes.append(f'{entry.place}: {key}: allowed is job.NAME.PARAM')
        elif stem in ('apscheduler', 'httpd'):
            ignored.add(f'{stem}.*')
        elif stem not in TORQUE_NAMES:
            ini.warn_if_near(stem.lower(), [*TORQUE_NAMES, 'job'], entry.place,
                             f'{key} means nothing to torque')
    for section, entries in ini.sections.items():
        if section not in SECTIONS:
            ini.warn_if_near(section, SECTIONS, first_place(entries),
                             f'section [{section}] means nothing to torque')
    for name, entries in groups.items():
        if 'handler' not in entries:
            ini.warn_if_near(name, groups.keys() - {name}, first_place(entries),
                             f'job.{name} has no handler')
    if ignored:
        ini.notes.append(f"settings of pyrocore without a use here: {' '.join(sorted(ignored))}")
    return groups


def checked(options: Iterable[Option], entries: dict[str, Entry], prefix: str,
            mistakes: list[str]) -> Settings:
    """Return the values of options, noting the mistakes in them."""
    values = Settings()
    for option in options:
        entry = entries.get(option.name) or entries.get(option.alias)
        typed = option.kind != 'text'           # empty is as if it were left out
        text = entry.value if entry and (entry.value or not typed) else option.default
        try:
            values[option.name] = None if typed and text == '' else option.parse(text)
        except UserError as error:
            place = entry.place if entry else first_place(entries)
            mistakes.append(f'{place}: {prefix}{option.name}: {error}')
            values[option.name] = None
    return values


def refuse_unknown(job: Any, prefix: str, entries: dict[str, Entry], shared: dict[str, Entry],
                   mistakes: list[str]) -> None:
    """Note what a built-in job, or the section for its like, has that is none of its options."""
    known = [name for option in (*CORE_OPTIONS, *job.options)
             for name in (option.name, option.alias) if name]
    groups = {prefix: entries, '': {} if job.section == 'TORQUE' else shared}
    mistakes += [f'{entry.place}: {before}{key}: {job.__name__} has no such option'
                 f"{nearest(key, known) or '; see --list-jobs'}"
                 for before, group in groups.items() for key, entry in group.items()
                 if key not in known and not key.startswith(job.families)]


def is_off(entries: dict[str, Entry]) -> bool:
    """Tell whether a job's settings say that it is not active."""
    return 'active' in entries and entries['active'].value.lower() in FALSE


def is_active(name: str, entries: dict[str, Entry], ini: Ini) -> bool:
    """Tell whether a job is active; warn of a slip that may be what keeps it from that."""
    if not is_off(entries):
        return True
    names = [option.name for option in CORE_OPTIONS]
    for key, entry in entries.items():
        if key not in names and key[:3] != 'cmd':
            ini.warn_if_near(key, names, entry.place, f'job.{name}.{key} of an inactive job')
    return False


def plan_job(name: str, entries: dict[str, Entry], ini: Ini, dry_run: bool) -> PlannedJob:
    """Return a job ready to be made, if there are no mistakes."""
    prefix, places = f'job.{name}.', {key: entry.place for key, entry in entries.items()}
    core = checked(CORE_OPTIONS, entries, prefix, ini.mistakes)
    make, schedule = core.pop('handler'), core.pop('schedule')
    config = JobConfig((key, entry.value if key in ('handler', 'schedule') else
                        convert(entry.value)) for key, entry in entries.items())
    for key in entries.keys() & {*JobConfig.__annotations__, *dir(dict)}:
        ini.warnings.append(f'{entries[key].place}: {prefix}{key}: config.{key} is something else; '
                            f'the job finds it as config[{key!r}]')
    if isinstance(make, type) and issubclass(make, Job) and make.options is not None:
        shared = ini.sections.get(make.section, {})
        refuse_unknown(make, prefix, entries, shared, ini.mistakes)
        for option in make.options:
            if option.name in entries and option.alias in entries:
                ini.warnings.append(f'{entries[option.alias].place}: {prefix}{option.alias} is '
                                    f'another name of {option.name}, and that counts')
        entries = {**entries, **{
            option.name: shared[option.name] for option in make.options
            if option.name in shared and entries.keys().isdisjoint((option.name, option.alias))}}
        config.update({key: entry.value for key, entry in entries.items()
                       if key.startswith(make.families)},
                      **checked(make.options, entries, prefix, ini.mistakes))
    config.update(core, job_name=name, dry_run=core.dry_run or dry_run)
    return PlannedJob(name, make, config, schedule, {**places, '': first_place(entries)},
                      {key: entry.value for key, entry in entries.items()})


class Config(Settings):
    """The loaded configuration: engine, torque, other sections in lower case.

    Empty at import; load() fills it in place, so `from torque import config_ini` is safe.
    """
    __setattr__ = object.__setattr__
    former: dict[tuple, Engine] = {}    # of the configuration before, which may serve on

    def load(self, path: str, overrides: Iterable[str] = (), dry_run: bool = False,
             only: str | None = None) -> None:
        """Read a file and plan its active jobs, or `only` one; raises Mistakes."""
        ini = read_files(path, overrides)
        options = checked(TORQUE_OPTIONS, ini.sections['TORQUE'], '', ini.mistakes)
        groups = group_jobs(ini)
        if only is not None and only not in groups:
            raise UnknownJob(f"there is no job {only!r}; the jobs are {' '.join(sorted(groups))}"
                             f'{nearest(only, groups)}')
        self.path, self.warnings, self.notes = path, ini.warnings, ini.notes
        self.clear()
        for section, entries in ini.sections.items():
            self[section.lower()] = Settings((key, entry.value) for key, entry in entries.items())
        self['torque'] = Settings((key, convert(text)) for key, text in self['torque'].items())
        self['torque'].update(options)
        self.state_dir = beside(path, options.state_dir) or default_state_dir(path)
        self.aliases = {name: text.split() for name, text in self.get('announce', {}).items()}
        self.engines: dict[tuple, Engine] = {}          # by address, timeout and limit
        self.scgi_entry = ini.sections['TORQUE'].get('scgi_url')
        self.engine = self.find_engine(ini.sections['TORQUE'], '', ini)
        folder = os.path.dirname(os.path.realpath(path))
        if folder not in sys.path:
            sys.path.append(folder)
        for entries in groups.values():         # modules first: they may add fields of torrents
            if 'handler' in entries and not is_off(entries):
                with contextlib.suppress(UserError):
                    import_handler(entries['handler'].value)
        self.jobs: list[PlannedJob] = []
        for name, entries in groups.items():
            if name == only or only is None and is_active(name, entries, ini):
                planned = plan_job(name, entries, ini, dry_run)
                planned.config.engine = self.engine
                if planned.config.scgi_url or planned.config.same_files is not None:
                    planned.config.engine = self.find_engine(entries, f'job.{name}.', ini)
                planned.config.state_dir, planned.config.alone = self.state_dir, bool(only)
                self.jobs.append(planned)
            elif only is not None and entries.get('scgi_url') and not is_off(entries):
                self.find_engine(entries, f'job.{name}.', ini)  # its items have data, too
        for planned in self.jobs:
            planned.config.engines = [*self.engines.values()]
        if ini.mistakes:
            raise Mistakes(ini.mistakes)

    def find_engine(self, entries: dict[str, Entry], prefix: str, ini: Ini) -> Any:
        """Return the Engine for scgi_url; without one for what rTorrent's own rc says."""
        entry, key = entries.get('scgi_url'), prefix + 'scgi_url'
        if prefix and not (entry and entry.value):
            entry, key = self.scgi_entry, 'scgi_url'
        url = entry.value if entry else ''
        try:
            if not url and ini.mistakes:        # it may be among what was not understood
                return None
            if not url:
                url, key = find_url(self.torque.rtorrent_rc), 'rtorrent_rc'
            same_files = self.torque.same_files
            if prefix and 'same_files' in entries:
                same_files = entries['same_files'].value.lower() in TRUE
            made_of = (url, self.torque.rpc_timeout or RPC_TIMEOUT,
                       self.torque.rpc_limit or RPC_LIMIT, same_files)
            if made_of not in self.engines:
                engine = self.former.get(made_of)
                if not engine:
                    engine = Engine(*made_of)
                    engine.aliases = self.aliases
                self.engines[made_of] = engine
            return self.engines[made_of]
        except UserError as error:
            entry = entry or entries.get('rtorrent_rc')
            ini.mistakes.append(f'{entry.place if entry else self.path}: {key}: {error}')
            return None

    def snapshot(self) -> list:
        """Return what restore() takes to go back to this configuration."""
        return [dict(self), dict(vars(self))]

    def restore(self, snapshot: list) -> None:
        """Go back to an earlier configuration."""
        values, attributes = snapshot
        self.update(values)                     # at no moment is it empty
        for name in set(self).difference(values):
            del self[name]
        vars(self).update(attributes)


def clean_up(name: str, job: Any) -> None:
    """Call a job's cleanup(), whatever comes of it."""
    try:
        getattr(job, 'cleanup', lambda: None)()
    except BaseException as error:
        logging.getLogger('torque.' + name).error('cleanup failed: %s', origin(error))


def make_jobs(plans: Iterable[PlannedJob]) -> dict[str, Any]:
    """Return job objects by name; raises Mistakes, and cleans up what was made until then."""
    made: dict[str, Any] = {}
    mistakes = []
    Engine.making.jobs = True
    try:
        for planned in plans:
            try:
                job = made[planned.name] = planned.make(planned.config)
                if not callable(getattr(job, 'run', None)):
                    raise UserError('the class has no run()')
            except UserError as error:
                place = planned.places.get(error.option) or planned.places['']
                option = '.'[:bool(error.option)] + error.option
                mistakes.append(f'{place}: job.{planned.name}{option}: {error}')
            except (Exception, SystemExit) as error:
                mistakes.append(f"{planned.places['']}: job.{planned.name} cannot be made: "
                                f'{origin(error)}')
        if mistakes:
            raise Mistakes(mistakes)
    except BaseException:                       # KeyboardInterrupt: torque is to end
        for name, job in made.items():
            clean_up(name, job)
        raise
    finally:
        Engine.making.jobs = False
    return made


config_ini = Config()


# --- Daemon ----------------------------------------------------------------------------------
# The life of the process: the lock on its pid file, what is remembered over restarts, pings of
# a monitor, reload, and the socket beside the pid file over which --status and --reload ask.
# What may take long (making jobs, cleanup, answers) has a thread of its own; tasks are changed
# in the main thread alone, by functions put into the scheduler's mail.

STATUS_TIMEOUT, RELOAD_TIMEOUT = 10, 60 # seconds that a daemon has to answer over its socket


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """Give a name for a Unix socket that fits into the 107 bytes it may have."""
    if len(os.fsencode(path)) <= 107:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        yield f'/proc/self/fd/{folder}/{os.path.basename(path)}'
    finally:
        os.close(folder)


class PidFile:
    """The file with the daemon's pid, locked as long as it lives: what is written does not count.

    Where somebody has removed it, the socket beside it tells.
    """

    def __init__(self, path: str):
        self.path = path
        self.stream: Any = None
        self.socket = path + '.sock'

    def acquire(self) -> bool:
        """Lock the file and write our pid; tell whether nobody else has it."""
        import fcntl
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            stream = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), 'r+')
        except OSError as error:
            raise UserError(f'pid file {self.path}: {error.strerror}') from None
        if self.listener():                     # the file was removed under a daemon
            stream.close()
            return False
        if not re.fullmatch(rb'[\s\0\d]{0,64}', os.pread(stream.fileno(), 65, 0)):
            stream.close()
            raise UserError(f'pid file {self.path}: this is something else; it is left alone')
        for _ in range(20):                     # holder() of another process has it for a moment
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        else:
            stream.close()
            return False
        self.stream = stream
        os.register_at_fork(after_in_child=stream.close)        # a job's child must not keep it
        with contextlib.suppress(OSError):      # on a full disk the lock has to do
            stream.truncate()
            os.write(stream.fileno(), b'%d\n' % os.getpid())
        return True

    def holder(self) -> int | None:
        """Return the pid of a running daemon, 0 where it cannot be told, None for no daemon."""
        import fcntl
        try:
            with open(self.path, encoding='ascii', errors='replace') as stream:
                text, file = stream.read(20).strip(), os.fstat(stream.fileno())
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return self.listener()
        except BlockingIOError:
            pass
        except (FileNotFoundError, NotADirectoryError):
            return self.listener()
        except OSError as error:
            raise UserError(f'pid file {self.path}: {error.strerror}') from None
        named = int(text) if text.isdigit() else 0
        try:                                    # Linux knows whose lock it is, whatever is written
            with open('/proc/locks', encoding='ascii') as locks:
                rows = [(words[5], int(words[4])) for words in map(str.split, locks)
                        if words[1] == 'FLOCK' and words[5].endswith(f':{file.st_ino}')]
        except OSError:
            return named
        place = f'{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}'
        ours = {pid for where, pid in rows if where == place}
        if named in (ours or {pid for _, pid in rows}):         # btrfs shows another device there
            return named
        return max(ours, default=0)

    def listener(self) -> int | None:
        """Return the pid of a daemon that answers, where nobody locks the file."""
        with contextlib.suppress(LoggableError, LookupError, TypeError, ValueError):
            return int(self.ask('status', 2)['pid'])
        return None

    def stop(self, seconds: float) -> bool:
        """End a running daemon, and tell whether there was one; returns when it is gone.

        seconds: how long that may take, unless the daemon says more.
        """
        import signal
        pid = self.holder()
        if pid is None:
            return False
        with contextlib.suppress(LoggableError, KeyError):
            seconds = max(seconds, self.ask('status', 2)['grace'] + 20)
        end = time.monotonic() + seconds
        if not pid:
            raise LoggableError(f'{self.path} is locked by a process that is not seen from here')
        try:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        except OSError as error:
            raise LoggableError(f'process {pid} cannot be ended: {error.strerror}') from None
        while self.holder() == pid:
            if time.monotonic() > end:
                raise LoggableError(f'process {pid} has not ended in {seconds:g} s')
            time.sleep(0.02)
        return True

    def ask(self, question: str, seconds: float) -> Any:
        """Return a running daemon's answer to status or reload."""
        try:
            with socket.socket(socket.AF_UNIX) as sock, short_path(self.socket) as path:
                sock.settimeout(seconds)
                sock.connect(path)
                sock.sendall(question.encode() + b'\n')
                return json.loads(b''.join(iter(lambda: sock.recv(65536), b'')))
        except FileNotFoundError:
            raise LoggableError(f'there is no {self.socket}: torque is starting, or could not make '
                                'it') from None
        except (OSError, ValueError) as error:
            raise LoggableError(f'the daemon does not answer over {self.socket}: {error}') from None


def in_thread(function: Callable[[], Any], here: bool = False) -> threading.Thread | None:
    """Start a function in a thread; where there can be none call it here, or not at all."""
    thread = threading.Thread(target=function, daemon=True)
    try:
        thread.start()
        return thread
    except RuntimeError:
        if here:
            function()
        return None


class Memory:
    """When jobs were last started, kept over restarts in a small file."""
    PAUSE = 600.0                       # seconds between savings that nobody waits for

    def __init__(self, folder: str):
        self.path = os.path.join(folder, 'starts.json')
        self.lock, self.saved_at, self.repeats = threading.Lock(), 0.0, Repeats()
        self.log = logging.getLogger('torque.main')
        self.starts: dict[str, float] = {}      # Unix seconds
        self.saved: dict[str, float] = {}       # what of that is on disk
        try:
            with open(self.path, encoding='utf-8') as stream:
                found = json.load(stream)
            if found['version'] != 1:
                raise ValueError(f"version {found['version']!r}")
            self.starts = {name: min(float(when), time.time())      # a clock may have been wrong
                           for name, when in found['starts'].items() if 0 < when < 1 << 33}
        except FileNotFoundError:
            pass
        except Exception as error:              # whatever a disk may have made of it
            self.log.warning('%s is not usable, starting without it: %s', self.path,
                             quoted(error, 80))

    def started(self, job: PlannedJob) -> None:
        """Note that a job starts: at once where a crash would have it called missed."""
        catch_up = job.config.catch_up          # then it is on disk before it does
        self.starts[job.name] = when = time.time()
        due = None if job.schedule.elapsed else job.schedule.next(when)
        if (catch_up or due and due - when > self.PAUSE
                or elapsed_time() - self.saved_at > self.PAUSE):
            self.save(-1 if catch_up else 1)    # a disk that hangs holds up no other job

    def plan(self, jobs: Iterable[PlannedJob]) -> None:
        """Note when jobs are planned for the first time: what they miss, they miss from then."""
        new = {job.name for job in jobs if not job.config.dry_run} - self.starts.keys()
        self.starts.update(dict.fromkeys(new, time.time()))
        if new:
            self.save(1)

    def save(self, patience: float) -> None:
        """Write the file, unless others are at it for so many seconds, -1 for ever.

        A disk that is full must not stop a job.
        """
        if not self.lock.acquire(timeout=patience):
            return
        try:
            starts = dict(self.starts)
            if starts != self.saved:            # of many at once the first saves them all
                self.saved_at = elapsed_time()
                replace_file(self.path, json.dumps({'version': 1, 'starts': starts}))
                self.saved = starts
        except LoggableError as error:
            if self.repeats.seen(str(error), self.saved_at):
                self.log.warning('%s', error)
        finally:
            self.lock.release()

    def missed(self, job: PlannedJob, now: float) -> bool:
        """Tell whether a run came due since the last start, while nobody was there."""
        if job.name not in self.starts or job.schedule.elapsed:
            return False
        unsaved = 0 if job.config.catch_up else self.PAUSE      # of later starts
        due = job.schedule.next(min(self.starts[job.name] + unsaved, now))
        return due is not None and due <= now


class Pinger:
    """Tells monitors of runs, each in a thread of its own: a deaf one delays nothing."""
    MOST_WAITING = 100                  # pings to one monitor; more are dropped

    def __init__(self) -> None:
        self.lock, self.repeats = threading.Lock(), Repeats()
        self.queues: dict[str, queue.Queue] = {}        # by scheme and host
        self.log = logging.getLogger('torque.ping')

    def send(self, url: str, text: str = '') -> None:
        """Queue one ping."""
        host = '/'.join(url.split('/', 3)[:3])
        with self.lock, contextlib.suppress(queue.Full):
            if host not in self.queues:
                waiting: queue.Queue = queue.Queue(self.MOST_WAITING)
                if not in_thread(lambda: self.work(waiting)):
                    return
                self.queues[host] = waiting
            self.queues[host].put_nowait((url, text))

    def work(self, waiting: queue.Queue) -> None:
        """Send the pings to one monitor, one after another; a thread."""
        while True:
            url, text = waiting.get()
            try:
                answer = http_post(url, text.encode('utf-8', 'replace'), {}, 10)
                trouble = '' if answer.status < 300 else f'HTTP {answer.status} {answer.reason}'
            except Exception as error:
                trouble = str(error)
            if trouble and self.repeats.seen((url, trouble), elapsed_time()):
                self.log.warning('%s: %s', url, trouble)
            waiting.task_done()

    def busy(self) -> bool:
        """Tell whether some ping is still on its way."""
        return any(waiting.unfinished_tasks for waiting in list(self.queues.values()))


def systemd_notify(state: str) -> None:
    """Tell systemd our state, when it wants to know (sd_notify)."""
    address = os.environ.get('NOTIFY_SOCKET', '')
    if address.startswith(('/', '@')):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX,
                                                         socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), address.replace('@', '\0', 1))


def scrubbed(text: str) -> str:
    """Return text without the passwords of URLs in it.

    >>> scrubbed('at http://me:secret@host/RPC2: refused')
    'at http://me:***@host/RPC2: refused'
    """
    def hidden(word: re.Match) -> str:
        secret, _, host = word[0].rpartition('@')
        start = re.search(r'\w://[^\s:/@]*:', secret)
        return f'{secret[:start.end()]}***@{host}' if start else word[0]
    return re.sub(r'\S+', hidden, text)


def end_process(status: int, at_once: bool = False) -> None:
    """End the process where Python would wait for threads or children of jobs, or crash."""
    if at_once or {'multiprocessing', 'concurrent.futures.thread'}.intersection(sys.modules) or any(
            not thread.daemon for thread in threading.enumerate()
            if thread is not threading.main_thread()):
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)


AS_ROOT = 'torque runs as root; the user of rTorrent is enough'


def warn_of_risks(config: Config, told: set[str]) -> None:
    """Log what lets others read secrets or run commands as this user, unless it is told."""
    risks = [(os.geteuid() == 0, AS_ROOT)]
    secrets = [key for section in config.values() for key, value in section.items() if value and (
        re.search(SECRET + '$', key) or redacted(value) != str(value))]

    def others_may(mode: int, path: str) -> bool:
        with contextlib.suppress(OSError):
            return bool(os.stat(path).st_mode & mode)
        return False
    risks += [(others_may(0o044, config.path),
               f'{config.path} holds {key} and can be read by others: chmod 600')
              for key in secrets[:1]]
    for engine in config.engines.values():
        address = engine.address
        risks.append((address.kind == 'unix' and others_may(0o002, address.path),
                      f'{address.where} is open to every user of this machine: each runs '
                      'commands as you'))
        risks.append((address.exposed, f'{address.where}: the RPC port of rTorrent may be open to '
                      'the network: whoever reaches it runs commands as you; bind it to '
                      '127.0.0.1 or use a socket'))
    risks += [(others_may(0o002, root), f'{root}, which is watched, can be written by every user')
              for job in config.jobs if isinstance(job.make, type) and issubclass(
                  job.make, TreeWatch) for root in job.make.folders(job.config)]
    for applies, text in risks:
        if applies and text not in told:
            told.add(text)
            logging.getLogger('torque.main').warning('%s', text)


class Daemon:
    """A running torque: its jobs, their tasks, and how they change."""

    def __init__(self, config: Config, reload: Callable[[Config], None], pid_file: PidFile):
        self.config, self.load_again, self.pid_file = config, reload, pid_file
        self.path = os.path.realpath(config.path)
        self.log = logging.getLogger('torque.main')
        self.scheduler, self.pinger = Scheduler(), Pinger()
        self.memory = Memory(config.state_dir)
        self.began, self.reloading = elapsed_time(), threading.Lock()
        self.options: Settings = config.torque  # in use; those of config may be half loaded
        self.jobs: dict[str, Any] = {}          # a new one may wait for an old one's last run
        self.leaving: dict[str, Task] = {}      # taken out, until their cleanup is over
        self.cleaning: list[threading.Thread] = []      # each has its job's name
        self.planned: dict[str, PlannedJob] = {}
        self.files: dict[str, int] = {}         # of modules: when they were changed
        self.told: set[str] = set()             # risks that are in the log
        self.missed: list[str] = []             # jobs that were due while torque did not run
        self.server: socket.socket | None = None

    def begin(self) -> None:
        """Make the jobs and their tasks; from now on signals and questions are answered."""
        import signal
        signal.signal(signal.SIGHUP, lambda *_: self.scheduler.mail.put(self.reload_soon))
        os.register_at_fork(after_in_child=lambda: [    # our signals are not those of a job's child
            signal.signal(number, signal.SIG_DFL)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)])
        self.jobs = make_jobs(self.config.jobs)
        self.planned = {planned.name: planned for planned in self.config.jobs}
        self.files = self.module_files()
        for number, end in ((signal.SIGTERM, self.scheduler.stop),
                            (signal.SIGINT, self.scheduler.interrupt)):
            signal.signal(number, lambda *_, end=end: self.scheduler.mail.put(end))
        self.server = self.listen()
        self.missed = [name for name, planned in sorted(self.planned.items())
                       if self.memory.missed(planned, time.time())]
        self.memory.plan(self.config.jobs)
        for name in self.jobs:
            self.scheduler.add(self.task(name, name in self.missed))

    def serve(self) -> int:
        """Run jobs on schedule until a signal comes; return the exit status."""
        warn_of_risks(self.config, self.told)
        self.log.info('started with %d job%s: %s', len(self.jobs), 's'[:len(self.jobs) != 1],
                      ', '.join(sorted(self.jobs)) or 'none is active')
        if self.missed:
            self.log.info('missed while torque was not running: %s', ', '.join(
                name + ' (made up for now)' * bool(self.planned[name].config.catch_up)
                for name in self.missed))
        systemd_notify('READY=1')
        self.scheduler.serve()
        systemd_notify('STOPPING=1')
        hung = self.finish()
        if self.server:
            self.server.close()
            with contextlib.suppress(OSError):
                os.remove(self.pid_file.socket)
        self.log.info('stopped%s', f"; still running: {', '.join(sorted(hung))}" if hung else '')
        if hung:
            Command.end_all()
        end_process(EXIT_OK, bool(hung))
        return EXIT_OK

    def finish(self) -> set[str]:
        """Let runs in progress end, clean up; return the names of those that still run."""
        self.scheduler.tasks.update(self.leaving)
        end, running = elapsed_time() + self.options.grace, self.scheduler.running()
        if running:
            self.log.info('stopping; %s may run for %g s more',
                          ', '.join(task.name for task in running), self.options.grace)
        hung = {task.name for task in self.scheduler.finish(self.options.grace)}
        for task in list(self.leaving.values()):
            if task.after_end and task.running_since is None:
                task.after_end()
        for name, job in self.jobs.items():
            if name not in hung or name in self.leaving:        # one that waits has never run
                self.clean_up(name, job)
        end = max(end, elapsed_time() + 0.8)
        for thread in self.cleaning:
            thread.join(max(end - elapsed_time(), 0))
        hung.update(thread.name for thread in self.cleaning if thread.is_alive())
        end = min(end, elapsed_time() + 3)      # a deaf monitor is not waited for longer
        while self.pinger.busy() and elapsed_time() < end:
            time.sleep(0.01)
        self.memory.save(0.5)
        return hung

    def clean_up(self, name: str, job: Any, then: Callable[[], Any] = lambda: None) -> None:
        """Clean up after a job in a thread: it may take long, or for ever."""
        def work() -> None:
            clean_up(name, job)
            then()
        thread = in_thread(work, here=True)
        if thread:
            thread.name = name
            self.cleaning = [*filter(threading.Thread.is_alive, self.cleaning), thread]

    def task(self, name: str, missed: bool = False) -> Task:
        """Return a task for a job; missed: it was due while torque was not running."""
        planned, job = self.planned[name], self.jobs[name]
        config, log = planned.config, logging.getLogger('torque.' + name)
        log.setLevel(config.log_level.upper() if config.log_level else logging.NOTSET)
        at_start = bool(getattr(job, 'at_start', False) or missed and config.catch_up)

        def ping(way: str, text: str = '') -> None:
            own = config.ping_url if 'ping_url' in planned.source else self.options.ping_url
            url, mark, query = (own or '').partition('?')
            if url:
                self.pinger.send(url.rstrip('/') + way + mark + query, scrubbed(text)[:10000])

        def run() -> None:
            """Run the job, and tell monitor and memory of it."""
            self.memory.started(planned)
            ping('/start')
            try:
                job.run()
            except BaseException as error:
                ping('/fail', f'{type(error).__name__}: {error_text(error)}')
                raise
            ping('')
        return Task(name, planned.schedule, job.run if config.dry_run else run,
                    config.max_runtime, log, at_start)

    @staticmethod
    def module_files() -> dict[str, int]:
        """Return when the files of modules that are not Python's own were changed."""
        own, files = os.path.dirname(os.__file__), {}
        for module in list(sys.modules.values()):
            file = getattr(module, '__file__', None) or own
            with contextlib.suppress(OSError):
                files[file] = 0 if file.startswith(own) else os.stat(file).st_mtime_ns
        return files

    def reload_soon(self) -> None:
        """Reload in a thread of its own: it may take long to make jobs."""
        if not in_thread(self.reload):
            self.log.error('not reloaded: there can be no thread for it')

    def reload(self) -> dict[str, list[str]]:
        """Read the configuration again and swap jobs; return mistakes, which kept the old."""
        mistakes, notes = ['an earlier reload is not at its end'], []
        if self.reloading.acquire(timeout=STATUS_TIMEOUT):
            try:
                systemd_notify(f'RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}')
                mistakes, changed = self.load_and_swap()
                notes = [f'{name} has changed: that needs a restart' for name in changed]
            finally:
                systemd_notify('READY=1')
                self.reloading.release()
        for line in mistakes:
            self.log.error('not reloaded: %s', line)
        for line in notes:
            self.log.warning('%s', line)
        return {'mistakes': mistakes, 'notes': notes}

    def load_and_swap(self) -> tuple[list[str], list[str]]:
        """Return mistakes, and what has changed that cannot be swapped: modules, settings."""
        before, loaded = self.config.snapshot(), Config()
        loaded.former = self.config.engines
        mistakes: list[str] = []
        try:
            self.load_again(loaded)
            self.config.restore(loaded.snapshot())      # what jobs see while they are made
            made = make_jobs(job for job in self.config.jobs if not self.is_same(job))
        except Exception as error:
            self.config.restore(before)
            mistakes = error.lines if isinstance(error, Mistakes) else [
                str(error) if isinstance(error, UserError) else origin(error)]
        changed = [file for file, stamp in self.module_files().items()
                   if self.files.setdefault(file, stamp) != stamp]
        if not mistakes:
            changed += [name for name in ('state_dir', 'pid_file', 'log_file')
                        if self.config.torque[name] != self.options[name]]
            swapped = threading.Event()

            def in_main_thread() -> None:
                """Swap, and let the wait here end whatever comes of that."""
                try:
                    self.swap(made)
                except Exception as error:
                    mistakes.append(origin(error))
                swapped.set()
            self.scheduler.mail.put(in_main_thread)
            swapped.wait()
            warn_of_risks(self.config, self.told)
            self.memory.plan(self.planned.values())
        return mistakes, changed

    def is_same(self, job: PlannedJob) -> bool:
        """Tell whether a job is planned as it runs already."""
        old = self.planned.get(job.name)
        return old is not None and old.source == job.source \
            and old.config.engine is job.config.engine

    def swap(self, made: dict[str, Any]) -> None:
        """Take out jobs that are gone or changed, put in those that are new or changed."""
        if self.scheduler.stopping:
            for name, job in made.items():
                self.clean_up(name, job)
            return
        self.options = self.config.torque
        for engine in self.config.engines.values():
            engine.aliases = self.config.aliases
        self.planned = {job.name: job for job in self.config.jobs}
        for name in [name for name in self.jobs if name in made or name not in self.planned]:
            self.retire(name)
        self.jobs.update(made)
        for name in made:
            if name not in self.leaving:
                self.scheduler.add(self.task(name))
        self.log.info('reloaded: %d jobs, %d of them new or changed', len(self.planned), len(made))

    def retire(self, name: str) -> None:
        """Take a job out; after its run and cleanup one of the same name may begin."""
        job = self.jobs.pop(name)
        if name in self.leaving:                # it was still waiting for that
            self.clean_up(name, job)
            return
        task = self.leaving[name] = self.scheduler.remove(name)

        def gone() -> None:
            del self.leaving[name]
            if name in self.jobs:
                self.scheduler.add(self.task(name))

        def over() -> None:
            if task.after_end:                  # once only, however the run and this race
                task.after_end = None
                self.clean_up(name, job, lambda: self.scheduler.mail.put(gone))
        task.after_end = over
        if task.running_since is None:
            over()

    def listen(self) -> socket.socket | None:
        """Open the socket for questions, served by a thread of its own."""
        server = socket.socket(socket.AF_UNIX)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.pid_file.socket)
            mask = os.umask(0o177)
            try:
                with short_path(self.pid_file.socket) as path:
                    server.bind(path)
            finally:
                os.umask(mask)
            server.listen(5)
            os.register_at_fork(after_in_child=server.close)
            threading.Thread(target=self.answer, args=(server,), daemon=True).start()
        except (OSError, RuntimeError) as error:
            server.close()
            self.log.warning('no --status and --reload: %s: %s', self.pid_file.socket, error)
            return None
        return server

    def answer(self, server: socket.socket) -> None:
        """Accept questions; a thread."""
        while server.fileno() >= 0:
            try:
                reply = functools.partial(self.reply, server.accept()[0])
            except OSError:                     # closed, or no more open files
                time.sleep(0.5)
            else:
                in_thread(reply, here=True)

    def reply(self, sock: socket.socket) -> None:
        """Answer a question."""
        with contextlib.suppress(Exception), sock:
            try:
                sock.settimeout(STATUS_TIMEOUT)
                answer = {b'status': self.status, b'reload': self.reload}[sock.recv(100).strip()]
                sock.sendall(json.dumps(answer()).encode())
            finally:            # close alone is no end while a child that a job forked has a copy
                sock.shutdown(socket.SHUT_RDWR)

    def status(self) -> dict:
        """Return the state of the daemon, its rTorrents and its jobs; times in Unix seconds."""
        up = elapsed_time()
        uptime, tasks = up - self.began, {**self.leaving, **self.scheduler.tasks}
        engines = [{'address': engine.address.where,
                    'version': '/'.join(engine.versions) if any(engine.versions) else None,
                    'away_for': None if engine.gone_since is None else up - engine.gone_since}
                   for engine in list(self.config.engines.values())]
        jobs = [{'name': task.name, 'state': 'overdue' if task.overdue else
                 'leaving' if task.removed else
                 'running' if task.running_since is not None else 'idle',
                 **{name: getattr(task, name) for name in (
                     'running_since', 'last_start', 'last_duration', 'runs', 'failures', 'missed')},
                 'last_error': task.last_error and scrubbed(task.last_error),
                 'next_run': None if task.removed else self.scheduler.next_run(task)}
                for _, task in sorted(tasks.items())]
        return {'pid': os.getpid(), 'version': VERSION, 'config': self.path,
            'started': time.time() - uptime, 'uptime': uptime, 'grace': self.options.grace,
            'stopping': self.scheduler.stopping,
            'log_file': next((log.baseFilename for log in logging.getLogger('torque').handlers
                              if isinstance(log, logging.FileHandler)), None),
            'rtorrent': engines, 'jobs': jobs}


def print_table(rows: list[tuple]) -> None:
    """Print rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_status(status: dict) -> None:
    """Print a daemon's status as a table."""
    def when(moment: float | None) -> str:
        return '-' if moment is None else time.strftime('%m-%d %H:%M:%S', time.localtime(moment))
    print(f"torque {status['version']}, pid {status['pid']}, up "
          f"{show_duration(status['uptime'])}{', stopping' * status['stopping']}, "
          f"{status['config']}"
          + (f", log {status['log_file']}" if status['log_file'] else ''))
    for engine in status['rtorrent']:
        print(f"rTorrent {engine['version'] or ''}".rstrip() + f" at {engine['address']}: " + (
            f"has not answered for {show_duration(engine['away_for'])}"
            if engine['away_for'] is not None else
            'answers' if engine['version'] else 'not asked yet'))
    print_table([('JOB', 'STATE', 'LAST RUN', 'TOOK', 'RUNS', 'FAILED', 'MISSED', 'NEXT RUN',
                  'LAST ERROR')] + [
        (job['name'], job['state'] + ('' if job['running_since'] is None else
                                      f" since {when(job['running_since'])}"),
         when(job['last_start']), '-' if job['last_duration'] is None else
         show_duration(job['last_duration']), str(job['runs']), str(job['failures']),
         str(job['missed']), when(job['next_run']), one_line(job['last_error'] or '-')[:100])
        for job in status['jobs']])


def detach() -> Callable[[int], None]:
    """Go into the background; return what is to be called with the exit status of the start.

    The process that was started waits for that, so that what goes wrong at the start still
    reaches the terminal.
    """
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        text = os.read(reader, 16)      # not to its end: a child may have it open
        os._exit(int(text) if text.isdigit() else EXIT_FAILED)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(EXIT_OK)

    def started(status: int) -> None:
        """Let the first process end with that status; close the terminal's streams when up."""
        if status == EXIT_OK:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.close(null)
        with contextlib.suppress(OSError):      # it may have been interrupted
            os.write(writer, str(status).encode())
        os.close(writer)
    return started


# --- Command line ----------------------------------------------------------------------------
# Arguments enter, an exit status leaves. Here alone are signals, the log's form and the
# end of the process. Signal handlers only put a function into the scheduler's mail.


class LogFormat(logging.Formatter):
    """A line a record: control characters in a message are escaped, tracebacks follow below."""

    def __init__(self, with_time: bool):
        super().__init__(('%(asctime)s ' if with_time else '') + '%(levelname)s %(job)s: %(text)s',
                         '%Y-%m-%d %H:%M:%S')

    def format(self, record: logging.LogRecord) -> str:
        record.job = record.name.partition('.')[2] or record.name
        record.text = scrubbed(one_line(record.getMessage()))
        return super().format(record)

    def formatException(self, ei: Any) -> str:
        return scrubbed(super().formatException(ei).translate({**CONTROL, 10: '\n'}))


def stderr_is_journal() -> bool:
    """Tell whether systemd's journal reads stderr: it names device and inode of the stream."""
    try:
        stream = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get('JOURNAL_STREAM') == f'{stream.st_dev}:{stream.st_ino}'


class LogFile(logging.handlers.RotatingFileHandler):
    """A log of 10 MiB and five older ones; begun anew when somebody moves it away."""

    def __init__(self, path: str):
        super().__init__(path, maxBytes=10 << 20, backupCount=5, encoding='utf-8')

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding,
                    opener=lambda path, flags: os.open(path, flags, 0o600))

    def doRollover(self) -> None:
        """Go on in the same file, opened again by emit(), where its folder cannot be written."""
        with contextlib.suppress(OSError):
            super().doRollover()

    def emit(self, record: logging.LogRecord) -> None:
        """Write to the file that now has the name."""
        try:
            same = os.path.samestat(os.stat(self.baseFilename),
                                    os.fstat(self.stream.fileno()))     # type: ignore[union-attr]
        except (OSError, ValueError, AttributeError):   # gone, or a full disk has closed it
            same = False
        if not same:
            with contextlib.suppress(OSError, ValueError):
                self.close()                    # emit() opens it again
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(self.baseFilename), mode=0o700, exist_ok=True)
        super().emit(record)


def set_up_log(level: int, log_file: str | None) -> None:
    """Send the log to stderr, or to a file; systemd's journal adds the time itself."""
    logging.raiseExceptions = False             # a closed stderr must not end anything
    try:
        handler = LogFile(os.path.expanduser(log_file)) if log_file else logging.StreamHandler()
    except OSError as error:
        raise UserError(f'log file {log_file}: {error.strerror}') from None
    handler.setFormatter(LogFormat(bool(log_file) or not stderr_is_journal()))
    root = logging.getLogger('torque')
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level)


def find_ini() -> str:
    """Return the first configuration file that exists in the usual places."""
    base = os.environ.get('XDG_CONFIG_HOME') or '~/.config'
    places = [os.path.expanduser(place) for place in (
        'torque.ini', f'{base}/torque/torque.ini', '~/.pyroscope/torque.ini')]
    for place in places:
        if os.path.isfile(place):
            return place
    raise UserError(f"no configuration: there is no {', '.join(places)}. To begin, copy "
                    'torque.ini.example to torque.ini, set scgi_url in it to where your '
                    'rTorrent answers, and start `python3 torque.py -c torque.ini`')


def run_once(config: Config) -> int:
    """Run the one planned job now, in the foreground."""
    import signal
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    planned, = config.jobs
    job = make_jobs(config.jobs)[planned.name]
    task = Task(planned.name, planned.schedule, job.run)
    task.log.setLevel((planned.config.log_level or 'NOTSET').upper())
    try:
        task.run()
        return EXIT_OK
    except KeyboardInterrupt:
        task.log.warning('interrupted')
    except BaseException as error:
        task.failed(error, elapsed_time())
        if getattr(error, 'told', False):
            task.log.error('failed: %s', error)
    finally:
        clean_up(planned.name, job)
    return EXIT_FAILED


def check(config: Config) -> int:
    """Print what would run and when, and whether rTorrent answers."""
    now = time.time()
    rows = [('JOB', 'HANDLER', 'SCHEDULE', 'NEXT RUNS')]
    make_jobs(config.jobs)
    for planned in config.jobs:
        due: float | None = now
        dates: list[str] = []
        if isinstance(planned.schedule, Interval):
            planned.schedule.start, due = now, now - 0.001
        while due is not None and len(dates) < 3:
            due = planned.schedule.next(due)
            if due is not None:
                dates.append(time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(due)))
        rows.append((planned.name, planned.config['handler'], planned.config['schedule'],
                     ', '.join(dates)))
    print_table(rows)
    for engine in dict.fromkeys([config.engine, *(job.config.engine for job in config.jobs)]):
        try:
            engine.open()
            print(f"{engine.address.where}: rTorrent {'/'.join(engine.versions)} answers")
        except RpcError as error:
            if not error.told:
                logging.getLogger('torque.engine').warning('%s', error)
    for planned in config.jobs:
        view, engine = planned.config.view or planned.config.viewname, planned.config.engine
        if planned.make in BUILT_IN.values() and view and engine.views and view not in engine.views:
            logging.getLogger('torque.' + planned.name).warning(
                'rTorrent has no view %r%s', view, nearest(view, engine.views))
    warn_of_risks(config, {AS_ROOT})
    print(f'{config.path}: no mistakes')
    return EXIT_OK


def explain(config: Config, path: str) -> int:
    """Print what every TreeWatch would do with a metafile."""
    lines = [f'{name}: {line}' for name, job in make_jobs(config.jobs).items()
             if isinstance(job, TreeWatch) for line in job.explain(path)]
    print('\n'.join(map(one_line, lines)) or 'no TreeWatch job is active')
    failed = not lines or any(' is not loaded: ' in line for line in lines)
    return EXIT_FAILED if failed else EXIT_OK


def list_jobs() -> int:
    """Print the built-in jobs and their options."""
    tables = {f"{name}\n    {(job.__doc__ or '').splitlines()[0]}": job.options or ()
              for name, job in BUILT_IN.items()}
    for title, options in {**tables, 'any job': CORE_OPTIONS, '[TORQUE]': TORQUE_OPTIONS}.items():
        print(title)
        for option in options:
            also = f' (or {option.alias})' if option.alias else ''
            print(f'    {option.name:<23} {option.kind:<7} {option.help}{also}'
                  + (f' [{option.default}]' if option.default != '' else ''))
        print()
    return EXIT_OK


def pid_file(arguments: Any, path: str) -> tuple[PidFile, float]:
    """Return the pid file that goes with a configuration, and the time that an end may take."""
    try:
        options = checked(TORQUE_OPTIONS, read_files(path, arguments.define).sections['TORQUE'],
                          '', [])
    except UserError:                           # it may be broken or gone by now
        options = Settings()
    folder = beside(path, options.state_dir) or default_state_dir(path)
    name = arguments.pid_file or beside(path, options.pid_file)
    return PidFile(os.path.abspath(name or os.path.join(folder, 'torque.pid'))), \
        (options.grace or 10) + 20


def control(arguments: Any, path: str) -> int:
    """Speak with a running daemon; return the exit status."""
    daemon, patience = pid_file(arguments, path)
    if daemon.holder() is None:
        if not arguments.pid_file:
            read_files(path, ())                # raises where it could have named another
        print('{}' if arguments.json else 'torque is not running')
        return EXIT_NOT_RUNNING
    if arguments.stop:
        daemon.stop(patience)
        return EXIT_OK
    if arguments.reload:
        answer = daemon.ask('reload', RELOAD_TIMEOUT)
        print('\n'.join(answer['notes'] + (answer['mistakes'] or ['reloaded'])),
              file=sys.stderr if answer['mistakes'] else sys.stdout)
        return EXIT_CONFIG if answer['mistakes'] else EXIT_OK
    status = daemon.ask('status', STATUS_TIMEOUT)
    if arguments.json:
        print(json.dumps(status, indent=1))
    else:
        print_status(status)
    return EXIT_FAILED if any(job['last_error'] or job['state'] == 'overdue'
                              for job in status['jobs']) else EXIT_OK


def load(config: Config, arguments: Any, path: str) -> None:
    """Load a configuration, and log what is noteworthy in it even when it is refused."""
    log = logging.getLogger('torque.config')
    config.warnings, config.notes = [], []
    try:
        config.load(path, arguments.define, arguments.dry_run, arguments.run_once)
    finally:
        for text in config.warnings:
            log.warning('%s', text)
        for text in config.notes:
            log.info('%s', text)


def run_daemon(arguments: Any, path: str, level: int) -> int:
    """Start, in the background when that is asked for, and run until a signal comes."""
    background = not arguments.fg and (arguments.daemon or arguments.restart or arguments.cron)
    lock, patience = pid_file(arguments, path)
    if arguments.cron and lock.holder() is not None:
        return EXIT_RUNNING                     # silently, before the file's warnings are repeated
    full_path = os.path.abspath(path)           # a job may go to another folder
    started = detach() if background else lambda status: None
    status = EXIT_FAILED
    try:
        load(config_ini, arguments, path)
        if arguments.restart:                   # not before the configuration is known to be good
            lock.stop(patience)
        if not lock.acquire():
            if not arguments.cron:
                print(f'torque is running already, with pid {lock.holder() or "unknown"} '
                      f'({lock.path})', file=sys.stderr)
            status = EXIT_RUNNING
            return status
        daemon = Daemon(config_ini, lambda config: load(config, arguments, full_path), lock)
        daemon.begin()
        if background:                          # once for the terminal, once for the log
            warn_of_risks(config_ini, set())
            log_file = arguments.log_file or beside(path, config_ini.torque.log_file)
            if not log_file:
                log_file = config_ini.state_dir + '/torque.log'
                with contextlib.suppress(OSError):      # what is wrong, the log file tells
                    os.makedirs(config_ini.state_dir, mode=0o700, exist_ok=True)
            set_up_log(level, log_file)
        status = EXIT_OK
        started(status)
        return daemon.serve()
    except UserError as error:
        print(error, file=sys.stderr)
        status = EXIT_CONFIG
        return status
    finally:
        if status != EXIT_OK:
            started(status)
            end_process(status)


def parse_arguments(words: list[str] | None) -> Any:
    """Return the command line's options."""
    import argparse
    parser = argparse.ArgumentParser(prog='torque', epilog=(__doc__ or '').rpartition('\n\n')[2],
                                     description='Run jobs on a schedule beside rTorrent.')
    option = parser.add_argument
    option('-c', '--config', metavar='FILE',
           help='configuration; left out: torque.ini, ~/.config/torque/torque.ini, '
                '~/.pyroscope/torque.ini')
    option('-D', dest='define', metavar='KEY=VALUE', action='append', default=[],
           help='set a key of [TORQUE], or section.KEY, over the file')
    option('--log-file', metavar='FILE', help='log to a file instead of stderr')
    option('--pid-file', metavar='FILE', help='left out, torque.pid in the state folder')
    for words_of_option, text in (
            (('-n', '--dry-run'), 'change nothing, only say what would be'),
            (('-v', '--verbose'), 'log more of what jobs do'),
            (('-q', '--quiet'), 'log only warnings and errors'),
            (('--debug',), 'log everything, with the traceback of any failure'),
            (('--daemon',), 'go into the background'),
            (('--fg', '--no-fork'), 'stay in the foreground, as it is without --daemon'),
            (('--cron',), 'as --daemon, and silent when it is running already'),
            (('--stop',), 'end the running daemon, and wait until it is gone'),
            (('--restart',), 'end it, if it runs, and start another in the background'),
            (('--status',), 'show the running daemon and its jobs'),
            (('--json',), 'with --status: for programs'),
            (('--reload',), 'let the running daemon read its configuration again'),
            (('--check',), 'check the configuration, show what would run'),
            (('--list-jobs',), 'show built-in jobs and their options')):
        option(*words_of_option, action='store_true', help=text)
    option('--run-once', metavar='JOB', help='run one job now, active or not, and exit')
    option('--explain', metavar='FILE', help='show what each TreeWatch would do with a metafile')
    option('--version', action='version', version=f'torque {VERSION}')
    arguments = parser.parse_args(words)
    if arguments.json and not arguments.status:
        parser.error('--json goes with --status')
    return arguments


def obey(arguments: Any) -> int:
    """Do what the command line says; return the exit status."""
    level = TRACE if arguments.debug else logging.DEBUG if arguments.verbose else \
        logging.WARNING if arguments.quiet else logging.INFO
    set_up_log(level, arguments.log_file)
    if arguments.list_jobs:
        return list_jobs()
    path = arguments.config or find_ini()
    if arguments.status or arguments.stop or arguments.reload:
        return control(arguments, path)
    if not (arguments.explain or arguments.check or arguments.run_once is not None):
        return run_daemon(arguments, path, level)
    load(config_ini, arguments, path)
    if arguments.explain:
        return explain(config_ini, arguments.explain)
    return check(config_ini) if arguments.check else run_once(config_ini)


def main(words: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    sys.modules['torque'] = sys.modules[__name__]       # what a job module imports is this one
    arguments = parse_arguments(words)
    for stream in (sys.stdout, sys.stderr):             # whatever it can encode: no traceback
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors='backslashreplace')       # type: ignore[union-attr]
    fd = os.open(os.devnull, os.O_RDWR)                 # what of 0 to 2 is closed must not
    while fd < 3:                                       # become a file of ours
        fd = os.dup(fd)
    os.close(fd)
    try:
        status = obey(arguments)
        print(end='', flush=True)
        return status
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UnknownJob) else EXIT_CONFIG
    except LoggableError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_FAILED
    except OSError as error:                            # a full disk; the reader of a pipe is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):          # as with `--list-jobs | head`
            return EXIT_OK
        print(f'torque: {error}', file=sys.stderr)
        return EXIT_FAILED


if __name__ == '__main__':
    sys.exit(main())
