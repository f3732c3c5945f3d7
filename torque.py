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
    Torrents            fields of torrents, and lists of them
    Filter and template conditions on torrents; text and commands with values put in
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
import io
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
import struct
import threading
import time
from datetime import date, datetime, timedelta
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

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
# Text from the ini becomes bool, seconds or bytes; numbers become text a person reads at a
# glance. The parsers raise UserError naming the value and what is allowed.

TRUE = frozenset('yes true on y t 1 +'.split())
FALSE = frozenset('no false off n f 0 -'.split())
NUMBER = r'([0-9]{1,15}(?:\.[0-9]{1,15})?)'
DURATION_UNITS = {'w': 604800, 'd': 86400, 'h': 3600, 'm': 60, 's': 1}
LONGEST = 10000 * DURATION_UNITS['w']   # seconds; dates and timeouts hold no more than centuries
SIZE_UNITS = {'': 1, 'b': 1, 'k': 1 << 10, 'm': 1 << 20, 'g': 1 << 30, 't': 1 << 40}


def parse_bool(text: Any) -> bool:
    """Return the truth that a word stands for."""
    word = str(text).strip().lower()
    if word not in TRUE and word not in FALSE:
        raise UserError(f'{text!r} is neither yes nor no; allowed are yes no true false on off 1 0')
    return word in TRUE


def parse_duration(text: Any) -> float:
    """Return the seconds in a length of time; a bare number is seconds.

    >>> parse_duration('1h30m'), parse_duration('0.25'), parse_duration(15)
    (5400.0, 0.25, 15.0)
    """
    part = NUMBER + r'\s*([wdhms]?)\s*'
    words = re.findall(part, str(text).lower())
    units = {unit for _, unit in words}
    seconds = sum(float(number) * DURATION_UNITS[unit or 's'] for number, unit in words)
    if (not re.fullmatch(rf'\s*(?:{part})+', str(text).lower()) or len(units) < len(words)
            or '' in units and len(words) > 1 or seconds > LONGEST):
        raise UserError(f'{text!r} is not a length of time; allowed are e.g. 15s 5m 1h30m 2d, '
                        'up to 10000w')
    return seconds


def parse_size(text: Any) -> int:
    """Return the bytes in a size; units are powers of 1024.

    >>> parse_size('1.5k'), parse_size('4G')
    (1536, 4294967296)
    """
    match = re.fullmatch(NUMBER + r'\s*([bkmgt]?)(?:i?b)?', str(text).strip().lower())
    if not match:
        raise UserError(f'{text!r} is not a size; allowed are e.g. 100m 4g 1.5t')
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def parse_count(text: Any) -> int:
    """Return a whole number, zero or more."""
    if not re.fullmatch(r'[0-9]{1,18}', str(text).strip()):
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
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if abs(number) < 1024:
            return f'{number:.0f} {unit}' if unit in ('B', 'KiB') else f'{number:.1f} {unit}'
        number /= 1024
    return f'{number:.1f} TiB'


CONTROL = {**{number: f'\\x{number:02x}' for number in [*range(32), *range(127, 160)]},
           0x2028: '\\u2028', 0x2029: '\\u2029'}


def one_line(text: str) -> str:
    """Return text with control characters escaped, so that it stays one line of a log."""
    return text.translate(CONTROL).encode('utf-8', 'backslashreplace').decode()


def quoted(text: Any, limit: int = 200) -> str:
    """Return hostile text fit for one log line: quoted, escaped, not endless.

    >>> print(quoted('a\\nb'))
    'a\\nb'
    """
    shown = repr(str(text))
    return shown if len(shown) <= limit else shown[:limit - 3] + '...'


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` for a misspelt word, or nothing."""
    import difflib
    close = difflib.get_close_matches(word, known, 1)
    return f'; did you mean {close[0]!r}?' if close else ''


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
# A scgi_url becomes an Address. The body of a request goes to it, and the body of the answer
# comes back within a deadline, over SCGI (one netstring of headers, one request a connection)
# or HTTP. Calls, (method, *params) each, become such bodies in XML-RPC or JSON-RPC, and answers
# become values. "where" is an address as it may be shown: never with a password. No state, and
# any thread. Unreachable: no answer came; any other RpcError: rTorrent answered, but not so.

# Seconds for a whole call
RPC_TIMEOUT = 30.0
# Bytes of one answer
RPC_LIMIT = 64 << 20
# Most times its limit that a value may take in memory
WEIGHT = 6
# Codes of faults: there is no such command
MISSING = (-506, -32601)
# Calls in one request; rTorrent takes 512 KiB at most
BATCH = 500
# Bytes before the body of an SCGI answer
HEAD_LIMIT = 8192
LOOPBACK = re.compile(r'localhost$|127\.|::1$')


class Address(NamedTuple):
    """Where rTorrent answers: kind is unix, tcp or http; `where` is fit for the log."""
    kind: str
    where: str
    path: str = ''
    host: str = ''
    port: int = 0
    user: str = ''
    password: str = ''
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
    refused = UserError(f'{redacted(text)!r} is no address; allowed are scgi://host:port, '
                        'scgi:///path, a socket path, http(s)://[user:password@]host/RPC2')
    spelt = os.path.expandvars(text.strip())
    if '://' not in spelt:
        spelt = 'scgi://' + spelt
    try:
        url = urlsplit(spelt)
        host, port = url.hostname or '', url.port or 0
    # What it says may hold a password
    except ValueError:
        raise refused from None
    if url.scheme in ('http', 'https') and host and not url.query and not url.fragment:
        netloc = url.netloc.rpartition('@')[2]
        clean = f"{url.scheme}://{netloc}{url.path or '/RPC2'}"
        return Address('http', clean, clean, host, port, unquote(url.username or ''),
                       unquote(url.password or ''))
    path = spelt.partition('://')[2]
    if url.scheme == 'scgi' and path.startswith(('/', '~')) and '\0' not in path:
        path = os.path.expanduser(path)
        return Address('unix', f'scgi://{path}', path)
    if url.scheme != 'scgi' or not port or url.path.strip('/'):
        raise refused
    exposed = not LOOPBACK.match(host)
    if host in ('', '0.0.0.0', '::'):
        host = '127.0.0.1'
    shown = host
    if ':' in host:
        shown = f'[{host}]'
    return Address('tcp', f'scgi://{shown}:{port}', '', host, port, exposed=exposed)


def set_deadline(sock: Any, end: float) -> None:
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


def too_large(limit: int) -> RpcError:
    """Return the error for an answer above the limit."""
    return RpcError(f'the answer is larger than {show_size(limit)}, the limit (rpc_limit)')


def connect(address: Address, seconds: float) -> socket.socket:
    """Return a socket that is connected to rTorrent."""
    if address.kind == 'tcp':
        return socket.create_connection((address.host, address.port), seconds)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(seconds)
        sock.connect(address.path)
    except BaseException:
        sock.close()
        raise
    return sock


def answer_end(received: bytearray, limit: int) -> int:
    """Return how long an answer will be with its head, 0 while the head is not complete."""
    stop = received.find(b'\r\n\r\n', 0, HEAD_LIMIT)
    if stop < 0 and len(received) < HEAD_LIMIT and b'Status:'.startswith(received[:7]):
        return 0
    size = re.search(rb'\r\ncontent-length: {0,9}(\d{1,15}) {0,9}\r\n', received[:stop + 2], re.I)
    if not size or not received.startswith(b'Status:'):
        raise Unreachable(f'the answer is not one of rTorrent: {quoted(beginning(received))}')
    if int(size[1]) > limit:
        raise too_large(limit)
    return stop + 4 + int(size[1])


def scgi_receive(sock: socket.socket, seconds: float, end: float, limit: int) -> bytearray:
    """Return the body of an SCGI answer."""
    received, size = bytearray(), 0
    try:
        while not size or len(received) < size:
            set_deadline(sock, end)
            chunk = sock.recv(1 << 18)
            if not chunk and not received:
                raise Unreachable('the connection was closed without an answer')
            if not chunk:
                raise Unreachable(f'the answer broke off after {len(received)} bytes')
            received += chunk
            size = size or answer_end(received, limit)
    except socket.timeout:
        if not received:
            raise Unreachable(f'connected, but no answer in {seconds:g} s: reading its session, '
                              'or hung') from None
        raise Unreachable(f'only {len(received)} of {size or "?"} bytes came in '
                          f'{seconds:g} s') from None
    if len(received) > size:
        raise Unreachable('the answer is longer than its Content-Length says')
    del received[:received.index(b'\r\n\r\n') + 4]
    return received


def scgi_request(address: Address, body: bytes, content_type: str, seconds: float,
                 limit: int) -> bytearray:
    """Send one SCGI request and return the body of its answer.

    Raises RpcError; the text says what happened, the caller adds where and which method.
    """
    head = f'CONTENT_LENGTH\0{len(body)}\0SCGI\0001\0CONTENT_TYPE\0{content_type}\0'
    end = time.monotonic() + seconds
    try:
        sock = connect(address, seconds)
    except socket.timeout:
        raise Unreachable(f'no connection within {seconds:g} s') from None
    except OSError as error:
        raise Unreachable(describe(error)) from None
    with sock:
        try:
            set_deadline(sock, end)
            sock.sendall(b'%d:%s,%s' % (len(head), head.encode(), body))
        except socket.timeout:
            # It may be slow to read: what it answers tells
            pass
        except OSError:
            raise Unreachable(f'the connection was closed during a request of {len(body)} '
                              'bytes: too large for it?') from None
        try:
            return scgi_receive(sock, seconds, end, limit)
        except OSError as error:
            raise Unreachable(describe(error)) from None


class HttpAnswer(NamedTuple):
    """What a web server said; headers.get() takes a name in any case."""
    status: int
    reason: str
    headers: Any
    body: bytearray


class TimedReader(io.RawIOBase):
    """A socket to read from until a moment; what http.client takes for the socket itself."""

    def __init__(self, sock: Any, end: float):
        super().__init__()
        self.sock, self.end = sock, end
        self.raw = sock.makefile('rb', buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        set_deadline(self.sock, self.end)
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def http_opener(url: str, user: str, password: str, end: float,
                close: contextlib.ExitStack) -> Any:
    """Return urllib's opener: with proxies and both kinds of login, but no redirections.

    No read outlasts `end`. close: closes all answers, for urllib forgets those before a login.
    """
    import http.client
    import urllib.request as lib

    def response(sock: Any, **options: Any) -> Any:
        reader: Any = TimedReader(sock, end)
        return close.enter_context(http.client.HTTPResponse(reader, **options))

    class Handler(lib.HTTPHandler, lib.HTTPSHandler):
        def do_open(self, http_class: Any, *args: Any, **options: Any) -> Any:
            def connection(*args: Any, **options: Any) -> Any:
                made = http_class(*args, **options)
                made.response_class = response
                return made
            return super().do_open(connection, *args, **options)

    passwords = lib.HTTPPasswordMgrWithDefaultRealm()
    if user:
        passwords.add_password(None, url, user, password)
    digest: Any = lib.HTTPDigestAuthHandler(passwords)
    # One try; urllib would make six
    digest.retried = 5
    proxies: dict | None = None                 # those of the environment
    if re.match(r'https?://(localhost|127\.|\[::1\])', url):
        proxies = {}
    opener = lib.OpenerDirector()
    opener.addheaders = [('User-Agent', f'torque/{VERSION}')]
    for handler in (lib.ProxyHandler(proxies), Handler(), lib.HTTPErrorProcessor(), digest,
                    lib.HTTPBasicAuthHandler(passwords), lib.HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    return opener


def http_body(answer: Any, limit: int) -> bytearray:
    """Return the whole body of a web server's answer."""
    content = bytearray()
    # urllib itself refused, as a second login
    if not answer.fp:
        return content
    while len(content) <= limit:
        chunk = answer.read(1 << 16)
        content += chunk
        if not chunk:
            break
    if len(content) > limit:
        raise too_large(limit)
    # What is still to come by its Content-Length
    if getattr(answer, 'length', 0):
        raise Unreachable(f'the answer broke off after {len(content)} bytes')
    return content


def http_trouble(error: Exception, seconds: float) -> str:
    """Return what to say of an error on the way to a web server."""
    reason = getattr(error, 'reason', error)
    if isinstance(reason, socket.timeout):
        return f'no whole answer in {seconds:g} s'
    if isinstance(reason, OSError):
        return describe(reason)
    if 'IncompleteRead' in str(reason):
        return 'the answer broke off'
    if 'scheme' in str(reason):
        return 'HTTP 401: it asks for a login neither basic nor digest'
    return f'not an answer of a web server: {quoted(reason)}'


def http_post(url: str, body: bytes, headers: dict, seconds: float, limit: int = 1 << 20,
              user: str = '', password: str = '') -> HttpAnswer:
    """POST to a web server; it may ask for a login by basic or digest authentication.

    Redirections are not followed. Raises Unreachable when there is no whole answer in time.
    """
    import http.client
    import urllib.error
    import urllib.request
    with contextlib.ExitStack() as close:
        opener = http_opener(url, user, password, time.monotonic() + seconds, close)
        try:
            request = urllib.request.Request(url, body, headers)
            try:
                answer = opener.open(request, timeout=seconds)
            # Any status but 2xx
            except urllib.error.HTTPError as error:
                answer = error
            return HttpAnswer(answer.code, str(answer.reason), answer.headers,
                              http_body(answer, limit))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(http_trouble(error, seconds)) from None


def http_request(address: Address, body: bytes, content_type: str, seconds: float,
                 limit: int) -> bytearray:
    """Send a request to an HTTP mount of rTorrent and return the body of its answer.

    What rTorrent says comes through with any status and content type.
    """
    answer = http_post(address.path, body, {'Content-Type': content_type}, seconds, limit,
                       address.user, address.password)
    start = answer.body[:1000]
    if b'<methodResponse' in start or b'"jsonrpc"' in start:
        return answer.body
    if answer.status == 401:
        raise Unreachable('HTTP 401: user or password is wrong or missing')
    raise Unreachable(f'HTTP {answer.status} {answer.reason} instead of an answer of '
                      f'rTorrent: {quoted(beginning(answer.body))}')


def rpc_fault(fault: Any) -> RpcError:
    """Return the exception for a fault; wordings differ, -506 alone is the same everywhere."""
    if not isinstance(fault, dict):
        return RpcError(f'a fault without a code: {quoted(fault)}')
    code = fault.get('faultCode', fault.get('code'))
    message = str(fault.get('faultString', fault.get('message')))
    if not isinstance(code, int):
        code = None
    said = f'fault {code}: {quoted(message)}'
    if 'info-hash' in message:
        return HashNotFound(said, code)
    if 'untrusted' in message:
        said += ('; the web server in between marks its connections as untrusted: '
                 'use scgi:// here')
    return RpcError(said, code)


def json_text(content: bytes | bytearray, room: int) -> str:
    """Return JSON text; RpcError if it and its value may take more than `room` bytes of memory."""
    # In CPython one emoji makes all characters of a text take 4 bytes; a number or a short text
    # takes 40 bytes and more, a list or a dict 90
    width = 1
    if not content.isascii():
        width = 4
    weight = 2 * width * len(content)
    for mark, size in ((b',', 40), (b'[', 90), (b'{', 90)):
        weight += size * content.count(mark)
    if weight > room:
        raise RpcError(f'the answer would take {show_size(weight)} of memory: more than {WEIGHT} '
                       'times the limit (rpc_limit)')
    return content.decode('utf-8', 'replace')


# XML-RPC. Requests are our own since xmlrpc.client takes 6 MiB and 14 ms to import; answers since
# expat, below it, fails over control characters and bytes that are not UTF-8, which rTorrent
# passes on from torrents, and takes three times as long.

# Other text goes as base64, which rTorrent takes for any text: older ones refuse emoji and
# control characters, no XML carries \r or bytes that are not UTF-8.
PLAIN_TEXT = re.compile('[\t\n -\ud7ff]*')


def sendable(value: Any) -> Any:
    """Return a value as both xmlrpc.client and rTorrent take it, in what it holds as well."""
    if isinstance(value, (list, tuple)):
        return [sendable(item) for item in value]
    if isinstance(value, dict):
        return {name: sendable(item) for name, item in value.items()}
    # Older ones refuse <boolean>
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int) and not -1 << 31 <= value < 1 << 31:
        # rTorrent takes text for numbers
        return str(value)
    if isinstance(value, str) and not PLAIN_TEXT.fullmatch(value):
        try:
            return value.encode('utf-8', 'surrogateescape')
        except UnicodeEncodeError:
            raise RpcError(f'{quoted(value)} cannot be sent to rTorrent') from None
    return value


def xml_escape(text: Any) -> str:
    """Return text as character data."""
    return str(text).replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')


def xml_value(value: Any) -> str:
    """Return the <value> of what sendable() gave."""
    if isinstance(value, str):
        return f'<value><string>{xml_escape(value)}</string></value>'
    if isinstance(value, int):
        return f'<value><i8>{value}</i8></value>'
    if isinstance(value, bytes):
        return f'<value><base64>{binascii.b2a_base64(value).decode()}</base64></value>'
    if isinstance(value, list):
        return f"<value><array><data>{''.join(map(xml_value, value))}</data></array></value>"
    if isinstance(value, dict):
        members = ''.join(f'<member><name>{xml_escape(name)}</name>{xml_value(item)}</member>'
                          for name, item in value.items())
        return f'<value><struct>{members}</struct></value>'
    raise RpcError(f'{type(value).__name__} {quoted(value)} cannot be sent to rTorrent; '
                   'allowed are text, whole numbers, bytes, lists and dicts')


def xml_request(method: str, params: Iterable) -> bytes:
    """Return a methodCall."""
    values = ''.join(f'<param>{xml_value(value)}</param>' for value in sendable(list(params)))
    return (f'<?xml version="1.0"?><methodCall><methodName>{xml_escape(method)}</methodName>'
            f'<params>{values}</params></methodCall>').encode()


def xml_batch(calls: list[tuple]) -> bytes:
    """Return one methodCall for many calls."""
    entries = [{'methodName': method, 'params': params} for method, *params in calls]
    return xml_request('system.multicall', [entries])


# An answer becomes JSON text by replacing its tags, in this order, so that the C code of `bytes`
# and `json` does all the work, and JSON's grammar finds what does not fit together:
#
#     <value><array><data>\r\n<value><i8>7</i8></value>\r\n</data></array></value>
#     [\r\n7\0\r\n]\0                         tags replaced; \0, which no XML holds, ends a value
#     [\n7],                                  \0 is a comma, but for the last value of a list
#
# A tag that stands in no pair (<double>, <ex:i8>) is left, and xmlrpc.client reads that answer.
XML_AS_JSON = (
    (b'\\', b'\\\\'),
    (b'"', b'\\"'),
    (b'<value><string>', b'"'),
    (b'</string></value>', b'"\0'),
    (b'<value><string/></value>', b'""\0'),
    (b'<value><i8>', b''),
    (b'</i8></value>', b'\0'),
    (b'<value><i4>', b''),
    (b'</i4></value>', b'\0'),
    (b'<value><int>', b''),
    (b'</int></value>', b'\0'),
    (b'<value><boolean>0</boolean></value>', b'false\0'),
    (b'<value><boolean>1</boolean></value>', b'true\0'),
    (b'<value><array><data>', b'['),
    (b'</data></array></value>', b']\0'),
    (b'<value><array><data/></array></value>', b'[]\0'),
    (b'<value><struct>', b'{'),
    (b'</struct></value>', b'}\0'),
    (b'<value><struct/></value>', b'{}\0'),
    (b'<member>', b''),
    (b'</member>', b''),
    (b'<name>', b'"'),
    (b'</name>', b'":'),
    # Line ends are as XML has them
    (b'\r\n', b'\n'),
    (b'\r', b'\n'),
    (b'\0]', b']'),
    (b'\0\n]', b']'),
    (b'\0}', b'}'),
    (b'\0\n}', b'}'),
    (b'\0\n\n}', b'}'),
    (b'\0', b','))
XML_HEAD = re.compile(rb'\s{0,9}(?:<\?xml[^>]{0,99}\?>)?\s{0,9}<methodResponse>\s{0,9}'
                      rb'(?:<params>\s{0,9}<param>|(<fault>))')
XML_TAIL = re.compile(rb'(?:</param>\s{0,9}</params>|</fault>)\s{0,9}</methodResponse>\s{0,9}\Z')
XML_ENTITIES = (
    (b'&lt;', b'<'),
    (b'&gt;', b'>'),
    (b'&quot;', b'\\"'),
    (b'&apos;', b"'"),
    (b'&#13;', b'\\r'),
    (b'&amp;', b'&'))


def xml_loads(content: bytes | bytearray, limit: int) -> Any:
    """Return the value in an unusual answer, read by xmlrpc.client, which takes more memory."""
    if b'<!' in content:
        raise Unreachable('the answer has a DTD or the like, which is refused')
    if len(content) > limit // 2:
        raise Unreachable('the answer is not XML-RPC as rTorrent writes it, and too large for it')
    import xmlrpc.client
    try:
        value = xmlrpc.client.loads(content.decode('utf-8', 'replace'), use_builtin_types=True)
        # It reads what is nested too deep for anybody else
        repr(value)
        return value[0][0]
    except xmlrpc.client.Fault as fault:
        raise rpc_fault(vars(fault)) from None
    # Of many kinds, as the damage has it
    except Exception:
        raise Unreachable(f'the answer is not XML-RPC: {quoted(beginning(content))}') from None


def xml_from_base64(found: re.Match) -> bytes:
    """Return a base64 element as text: rTorrent sends so what is not UTF-8."""
    text = xml_escape(binascii.a2b_base64(found[1]).decode('utf-8', 'replace'))
    return b'<string>%s</string>' % text.replace('\r', '&#13;').encode()


def xml_as_json(inner: bytes) -> bytes:
    """Return JSON text for what stands in the <param> of an answer; ValueError where it cannot."""
    # NUL is a mark below
    inner = inner.replace(b'\0', b'?')
    if b'<base64>' in inner:
        inner = re.sub(b'<base64>([^<]*)</base64>', xml_from_base64, inner)
    for tag, mark in XML_AS_JSON:
        inner = inner.replace(tag, mark)
    if b'<' in inner:
        raise ValueError('a tag that rTorrent does not send')
    if b'&' in inner:
        if inner.count(b'&') > sum(inner.count(entity) for entity, _ in XML_ENTITIES):
            raise ValueError('an entity that rTorrent does not send')
        for entity, character in XML_ENTITIES:
            inner = inner.replace(entity, character)
    return inner.rstrip(b'\n,')


def xml_reply(content: bytes | bytearray, limit: int = RPC_LIMIT) -> Any:
    """Return the value in the body of an answer; raises RpcError for a fault or a non-answer."""
    head = XML_HEAD.match(content)
    tail = XML_TAIL.search(content, max(len(content) - 100, 0))
    if not head or not tail:
        return xml_loads(content, limit)
    # Text and value take enough memory
    with memoryview(content) as view:
        inner = bytes(view[head.end():tail.start()])
    try:
        inner = xml_as_json(inner)
        text = json_text(inner, WEIGHT * limit - len(content))
        del inner
        value = json.loads(text, strict=False)
    except ValueError:
        return xml_loads(content, limit)
    if head[1]:
        raise rpc_fault(value)
    return value


def xml_answers(content: bytes | bytearray, count: int, limit: int = RPC_LIMIT) -> list:
    """Return the answers to `count` calls, an RpcError in the place of each that failed."""
    entries = xml_reply(content, limit)
    if not isinstance(entries, list) or len(entries) != count:
        raise RpcError('system.multicall did not answer every call')
    answers = []
    for entry in entries:
        if isinstance(entry, list) and entry:
            answers.append(entry[0])
        else:
            answers.append(rpc_fault(entry))
    return answers


# JSON-RPC is answered by 0.15 and later. It is 15 times faster to read and carries every
# character, but a single name that is not UTF-8 turns a whole answer into an error.
JSON_NOT_UTF8 = 'type_error.316'


def json_batch(calls: list[tuple]) -> bytes:
    """Return one request for many calls; their ids count from 0."""
    items = [{'jsonrpc': '2.0', 'id': number, 'method': method, 'params': params}
             for number, (method, *params) in enumerate(calls)]
    try:
        return json.dumps(items).encode()
    except (TypeError, ValueError) as error:
        raise RpcError(f'this cannot be sent to rTorrent: {error}') from None


def json_answers(text: str, count: int) -> list:
    """Return the answers to `count` calls, an RpcError in the place of each that failed.

    Raises it where there is no answer to all, as when one text in it is not UTF-8.
    """
    items = None
    with contextlib.suppress(ValueError):
        items = json.loads(text)
    if not isinstance(items, list):
        items = [items]
    answers = []
    for item in items:
        if not isinstance(item, dict):
            raise Unreachable(f'the answer is not JSON-RPC: {quoted(text[:80])}')
        if 'result' in item:
            answers.append(item['result'])
            continue
        fault = rpc_fault(item.get('error'))
        if len(items) < count or JSON_NOT_UTF8 in str(fault):
            # One for all
            raise fault
        answers.append(fault)
    if len(answers) != count:
        raise RpcError('the batch did not answer every call')
    return answers


# rTorrent 0.9.8 aborts over a command on files without the file's index, be it called, among the
# fields of a list, or one of the commands that others run. The latter may hold names of torrents:
# they are no commands unless they begin so.
FILE_COMMAND = re.compile(r'(?<![\w.])f\.(?!multicall)[a-z]')
RUNS_COMMANDS = re.compile(r'load\.|branch$')


def refuse_deadly(method: str, params: Iterable) -> None:
    """Refuse f.x(HASH), which needs a target HASH:fINDEX, in any disguise."""
    params, deadly = list(params), False
    # What f.multicall runs has an index
    words = [param.partition('f.multicall')[0].lstrip('$ ')
             for param in params if isinstance(param, str)]
    if method == 'system.multicall':
        for entry in params[0]:
            refuse_deadly(entry['methodName'], entry['params'])
    elif FILE_COMMAND.match(method):
        deadly = ':f' not in str(params[:1])
    elif '.multicall' in method and not method.startswith('f.'):
        deadly = any(FILE_COMMAND.search(word) for word in words)
    elif RUNS_COMMANDS.match(method):
        deadly = any(FILE_COMMAND.match(word) for word in words[1:])
    if deadly:
        raise RpcError(f'{method} needs a target HASH:fINDEX; without it rTorrent would abort')


class Transport:
    """Carries the calls of an xmlrpc.client.ServerProxy; `carry` makes a value of a request."""

    def __init__(self, carry: Callable[[bytes], Any]):
        self.carry = carry

    def request(self, host: str, handler: str, body: bytes, verbose: bool = False) -> tuple:
        """Return what a call answers, alone in a tuple; host and handler are placeholders."""
        return (self.carry(body),)

    def close(self) -> None:
        """Do nothing: there is a connection for each call."""


@functools.lru_cache(None)
def proxy_class() -> Any:
    """Return the class of what Engine.open() gives, a ServerProxy that takes more values."""
    import xmlrpc.client

    class Proxy(xmlrpc.client.ServerProxy):
        # What every call of a ServerProxy goes through is its private __request.
        def _ServerProxy__request(self, method: str, params: tuple) -> Any:
            refuse_deadly(method, params)
            request = super()._ServerProxy__request         # type: ignore[misc]
            return request(method, tuple(sendable(params)))

    return Proxy


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
ABOUT = ('view.list session.name session.path system.client_version system.library_version '
         'system.pid startup_time network.rpc.use_jsonrpc').split()
RC_FILES = ['$XDG_CONFIG_HOME/rtorrent/rtorrent.rc', '~/.config/rtorrent/rtorrent.rc',
            '~/.rtorrent.rc']
RC_ADDRESS = ('network.scgi.open_local', 'scgi_local', 'network.scgi.open_port', 'scgi_port')
# Characters of an rc that are read
RC_LIMIT = 1 << 20


class Stats(NamedTuple):
    """The figures of an rTorrent; rates in bytes a second; None is what it does not tell."""
    engine_id: str
    version: str
    uptime: float | None                # seconds
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


def process_start(pid: int, address: Address) -> float | None:
    """Return when a local rTorrent process was started, in Unix seconds; None if not known."""
    if not address.is_local():
        return None
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as stat:
            name, _, fields = stat.read().partition('(')[2].rpartition(')')
        # The pid belongs to a container
        if not name.startswith('rtorrent'):
            return None
        # Ticks after boot at which it began: proc(5)
        ticks = int(fields.split()[19])
    except (OSError, ValueError, IndexError):
        return None
    booted = time.time() - elapsed_time()
    return booted + ticks / os.sysconf('SC_CLK_TCK')


def without_errors(answers: list) -> list:
    """Return the answers of Engine.ask() or tell(); raises the first RpcError among them."""
    for answer in answers:
        if isinstance(answer, RpcError):
            raise answer
    return answers


def typed(answer: Any, unknown: Any) -> Any:
    """Return an answer if it is of the same type as `unknown`, else that."""
    if isinstance(answer, type(unknown)):
        return answer
    return unknown


def texts(answer: Any) -> frozenset[str]:
    """Return the texts in an answer that is a list."""
    return frozenset(item for item in typed(answer, []) if isinstance(item, str))


class Engine:
    """One rTorrent; every method raises RpcError when it does not answer as it should.

    What it is and offers is in the attributes once ask(), tell(), has() or reach() was called.
    aliases: of trackers, name -> beginnings of their URLs.
    """

    def __init__(self, url: str, timeout: float = RPC_TIMEOUT, limit: int = RPC_LIMIT,
                 aliases: dict[str, list[str]] | None = None):
        self.address = parse_address(url)
        self.timeout = timeout
        self.limit = limit
        self.aliases = aliases or {}
        self.log = logging.getLogger('torque.engine')
        # Guards gone_since
        self.lock = threading.Lock()
        # In elapsed time
        self.gone_since: float | None = None
        # What reach() knows is of this socket file
        self.stamp: tuple | None = None
        self.methods = texts([])
        self.views = texts([])
        self.engine_id = ''
        self.session_path = ''
        self.versions = ('', '')
        self.pid = 0
        # Unix seconds
        self.startup: float | None = None
        self.speaks_json = False
        # Questions whose answer JSON could not carry
        self.xml_only: set[str] = set()

    def open(self) -> Any:
        """Return an xmlrpc.client.ServerProxy for this rTorrent: engine.open().d.name(HASH)."""
        transport = Transport(self.carry)
        return proxy_class()('http://rtorrent/RPC2', transport=transport)

    def carry(self, body: bytes) -> Any:
        """Return the answer to one methodCall."""
        method = body.partition(b'<methodName>')[2].partition(b'<')[0].decode()
        with self.exchange(method):
            return xml_reply(self.send(body, 'text/xml'), self.limit)

    def ask(self, calls: Iterable[tuple]) -> list:
        """Return the answers to many questions, (method, *params) each, in one round trip.

        In the place of one that failed is its RpcError. Questions only: they may be sent twice.
        """
        self.reach()
        return self.in_parts(calls, self.best_answers)

    def tell(self, calls: Iterable[tuple]) -> list:
        """Return the answers to commands, as ask() does; these are never sent twice."""
        self.reach()
        return self.in_parts(calls, self.answers_by_xml)

    def in_parts(self, calls: Iterable[tuple], get: Callable[[list[tuple]], list]) -> list:
        """Return the answers to calls, of which each request takes BATCH."""
        left, answers = list(calls), []
        for start in range(0, len(left), BATCH):
            part = left[start:start + BATCH]
            name = part[0][0]
            if len(part) > 1:
                name = f'a batch from {name} on'
            with self.exchange(name):
                for method, *params in part:
                    refuse_deadly(method, params)
                found = get(part)
            for (method, *_), answer in zip(part, found):
                if isinstance(answer, RpcError):
                    answer = self.failed(answer, method)
                answers.append(answer)
        return answers

    def best_answers(self, calls: list[tuple]) -> list:
        """Return the answers to questions that go out together, by JSON where it serves."""
        question = repr([(method, *params[1:]) for method, *params in calls])
        if not self.speaks_json or question in self.xml_only:
            return self.answers_by_xml(calls)
        text = json_text(self.send(json_batch(calls), 'application/json'), WEIGHT * self.limit)
        try:
            return json_answers(text, len(calls))
        except RpcError as error:
            if JSON_NOT_UTF8 not in str(error):
                raise
        if len(self.xml_only) >= 1000:
            self.xml_only.clear()
        self.xml_only.add(question)
        return self.answers_by_xml(calls)

    def answers_by_xml(self, calls: list[tuple]) -> list:
        """Return the answers to calls that go out together, by XML."""
        content = self.send(xml_batch(calls), 'text/xml')
        return xml_answers(content, len(calls), self.limit)

    def send(self, body: bytes, content_type: str) -> bytearray:
        """Carry a request to rTorrent and the body of the answer back."""
        request = scgi_request
        if self.address.kind == 'http':
            request = http_request
        self.log.log(TRACE, 'to %s: %s', self.address.where, quoted(beginning(body), 400))
        return request(self.address, body, content_type, self.timeout, self.limit)

    @contextlib.contextmanager
    def exchange(self, name: str) -> Iterator[None]:
        """Let what fails in here say where and in which call, and notice whether it does."""
        try:
            try:
                yield
            except RecursionError:
                raise RpcError('the answer is nested too deep') from None
        except RpcError as error:
            named = self.failed(error, name)
            self.notice(named)
            raise named from None
        self.notice(None)

    def failed(self, error: RpcError, method: str) -> RpcError:
        """Return the error that says where and which call failed; look again if need be."""
        if isinstance(error, Unreachable) or error.code in MISSING:
            # It may have been restarted or upgraded
            self.stamp = None
        return type(error)(f'{self.address.where}: {method}: {error}', error.code)

    def notice(self, error: RpcError | None) -> None:
        """Log that rTorrent has gone, or is back; an error that says so counts as told."""
        with self.lock:
            if isinstance(error, Unreachable):
                error.told = True
                if self.gone_since is None:
                    self.gone_since = elapsed_time()
                    self.log.warning('%s', error)
            elif self.gone_since is not None:
                self.log.info('%s answers again, after %s', self.address.where,
                              show_duration(elapsed_time() - self.gone_since))
                self.gone_since = None

    def reach(self) -> None:
        """Look what rTorrent is and offers, unless that is known; RpcError if it is away."""
        stamp = None
        # A restarted rTorrent makes a new socket file
        with contextlib.suppress(OSError):
            found = os.stat(self.address.path)
            stamp = found.st_ino, found.st_ctime_ns
        if self.stamp is None or stamp != self.stamp[0]:
            self.look()
            self.stamp = (stamp,)

    def look(self) -> None:
        """Ask rTorrent who it is and what it offers."""
        self.methods = texts(self.carry(xml_request('system.listMethods', [])))
        if not self.methods:
            raise RpcError(f'{self.address.where}: system.listMethods: this is no list of commands')
        calls = [(command, '') for command in ABOUT]
        answers = self.in_parts(calls, self.answers_by_xml)
        views, name, path, client, library, pid, startup, by_json = answers
        self.views = texts(views)
        self.engine_id = typed(name, self.address.where)
        self.session_path = typed(path, '')
        self.versions = (typed(client, '?'), typed(library, '?'))
        self.pid = typed(pid, 0)
        self.startup = typed(startup, 0) or process_start(self.pid, self.address)
        self.speaks_json = by_json == 1

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
        if self.startup is None:
            return None
        return max(time.time() - self.startup, 0)

    def stats(self) -> Stats:
        """Return rTorrent's figures, asked in one round trip."""
        self.reach()
        calls: dict[str, tuple] = {'pid': ('system.pid', '')}
        for name, command in GAUGES.items():
            if command in self.methods:
                calls[name] = (command, '')
        for view in VIEWS:
            calls[view] = ('view.size', '', view)
        began = time.perf_counter()
        answers = self.ask(calls.values())
        rpc_time = time.perf_counter() - began
        told = {name: answer for name, answer in zip(calls, answers) if isinstance(answer, int)}
        # It was restarted
        if told.get('pid', self.pid) != self.pid:
            self.stamp = None
            self.reach()
        return Stats(
            engine_id=self.engine_id,
            version='/'.join(self.versions),
            uptime=self.uptime,
            views={view: told.get(view) for view in VIEWS},
            rpc_time=rpc_time,
            **{name: told.get(name) for name in GAUGES})


def split_outside(text: str, mark: str) -> list[str]:
    """Return text split at marks that are outside of quotes and parentheses."""
    parts: list[list[str]] = [[]]
    depth = 0
    for piece in re.findall(r'"[^"]*"?|[^"]', text):
        if piece in '({':
            depth += 1
        elif piece in ')}':
            depth -= 1
        if piece == mark and depth <= 0:
            parts.append([])
        else:
            parts[-1].append(piece)
    return [''.join(part) for part in parts]


def rc_value(text: str, settings: dict, depth: int = 0) -> str:
    """Return what an rc's value comes to: text, (command,args) or $command=args."""
    text = text.strip()
    if depth > 20:
        raise UserError(f'rtorrent.rc: {text!r} refers to itself; set scgi_url in [TORQUE]')
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    if text.startswith('$'):
        inner = text[1:].replace('=', ',', 1)
    elif text.startswith('(') and text.endswith(')'):
        inner = text[1:-1]
    else:
        return text
    name, *args = split_outside(inner, ',')
    name = name.strip()
    values = [rc_value(arg, settings, depth + 1) for arg in args]
    if name == 'cat':
        return ''.join(values)
    if name == 'system.env':
        return os.environ.get(''.join(values), '')
    if name not in settings:
        raise UserError(f'the address in rtorrent.rc needs rTorrent to work out {name!r}; '
                        'set scgi_url in [TORQUE]')
    value = rc_value(settings[name], settings, depth + 1)
    if name == 'session.path':
        value = os.path.join(os.path.expanduser(value), '')
    return value


def read_rc(path: str, settings: dict, seen: set[str]) -> None:
    """Add the commands of an rc and of the files it imports to settings; later ones win.

    seen: the files that are read, none of which is read again: one may import itself.
    """
    try:
        path = os.path.realpath(path)
        if path in seen:
            return
        seen.add(path)
        with open(path, encoding='utf-8', errors='replace') as stream:
            text = stream.read(RC_LIMIT).replace('\\\n', ' ')
    # Its name may hold a NUL
    except (OSError, ValueError) as error:
        raise UserError(f'{one_line(path)}: {error}; set scgi_url in [TORQUE]') from None
    for line in text.splitlines():
        if not line.lstrip().startswith('#'):
            for command in split_outside(line, ';'):
                read_command(path, command, settings, seen)


def import_rc(path: str, value: str, settings: dict, seen: set[str]) -> None:
    """Read what an rc imports; its name may be worked out from settings."""
    target = os.path.expanduser(rc_value(value, settings))
    read_rc(os.path.join(os.path.dirname(path), target), settings, seen)


def read_command(path: str, command: str, settings: dict, seen: set[str]) -> None:
    """Add a command of an rc to settings, if it is one that tells something."""
    key, equals, value = (part.strip() for part in command.partition('='))
    if key == 'import':
        import_rc(path, value, settings, seen)
    elif key == 'try_import':
        with contextlib.suppress(UserError):
            import_rc(path, value, settings, seen)
    elif key == 'method.insert':
        name, *rest = split_outside(value, ',')
        if len(rest) > 1:
            settings[name.strip()] = rest[-1].strip()
    elif key == 'session':
        settings['session.path'] = value
    elif equals:
        settings[re.sub(r'\.set$', '', key)] = value


def find_url(rc_file: str | None) -> str:
    """Return the scgi_url that rTorrent's own configuration gives.

    rc_file None: the first of RC_FILES that exists. Raises UserError naming what was read.
    """
    names = RC_FILES
    if rc_file:
        names = [rc_file]
    for name in names:
        path = os.path.expanduser(os.path.expandvars(name))
        if not os.path.isfile(path):
            continue
        settings: dict = {}
        read_rc(path, settings, set())
        for key in RC_ADDRESS:
            if key not in settings:
                continue
            url = rc_value(settings[key], settings)
            if key.endswith('local'):
                return os.path.expanduser(url)
            return 'scgi://' + url
        raise UserError(f'{path} opens no SCGI port or socket (network.scgi.open_local); '
                        'set scgi_url in [TORQUE]')
    raise UserError('is not set in [TORQUE], and there is no '
                    f"{' or '.join(names)} (rtorrent_rc) to take it from; "
                    '-D scgi_url=ADDRESS sets it for once')


# --- Torrents --------------------------------------------------------------------------------
# Names of fields enter, rows leave: a Torrent maps a field's name to its value. A field is
# worked out from raw values: what a d. command answers, or a second question ("files",
# "trackers") that is asked only for torrents which the cheap conditions have left over.

SOURCES = {                             # second questions: command, and the columns of its rows
    'files': ('f.multicall', ('f.path=', 'f.size_bytes=')),
    'trackers': ('t.multicall', ('t.url=', 't.is_enabled=', 't.scrape_complete=',
                                 't.scrape_incomplete=', 't.failed_time_last=',
                                 't.success_time_last='))}
TV = re.compile(r'^(?P<show>.+?)[._ -]+(?:S(?P<season>\d{1,2})(?:E(?P<episode>\d{2,3}))?|'
                r'\d{1,2}x\d{2}|'
                r'(?P<date>\d{4}[._-]\d{2}[._-]\d{2}))(?:[._ -](?P<title>.*))?$', re.I)
MOVIE = re.compile(r'^(?P<title>.+?)[._ -]+[\[(]?(?P<year>(?:19|20)\d\d)[\])]?(?:[._ -].*)?$')
KINDS = {kind: traits for traits, kinds in {
    'audio': 'flac mp3 ogg opus m4a wav dts ac3 alac wma ape',
    'video': 'avi mkv m4v vob mp4 mpg mpeg m2ts ts ogv wmv webm mov',
    'img': 'jpg jpeg png gif tif bmp svg webp',
    'docs': 'chm pdf cbr cbz odt ods doc docx xls xlsx ppt epub mobi azw3 djvu',
    'misc': 'rar zip tgz gz bz2 xz 7z iso bin'}.items() for kind in kinds.split()}


class Torrent(dict):
    """One item: field name -> value; `hash` and `name` are always there."""

    def __str__(self) -> str:
        return f"{quoted(self['name'])} {self['hash']}"


class TorrentField(NamedTuple):
    """A field: the type that conditions see, and how its value comes from the raw ones."""
    kind: str                           # text bool number size time duration tags files
    needs: tuple                        # raw values: commands, SOURCES, now, aliases, session
    value: Callable | None = None       # a function of them in this order; None: the one itself
    on_disk: bool = False               # needs a look at the disk

    @property
    def slow(self) -> bool:
        """Does it cost more than a column of the list?"""
        return self.on_disk or bool(SOURCES.keys() & self.needs)


def data_path(base: str, directory: str, name: str, multi: int) -> str:
    """Return where the data is; rTorrent tells the base path only of items opened once."""
    return base or directory and (directory if multi else os.path.join(directory, name))


def first_number(*values: Any) -> int:
    """Return the first value that is a number above 0; 0 for a time that is not known."""
    return next((int(value) for value in values if str(value).isdecimal() and int(value)), 0)


def time_started(activations: str, start: float, end: float,
                 unmarked: float | None) -> float | None:
    """Return the seconds between R(esumed) and P(aused) marks that lie within a window."""
    spans = re.findall(r'R([0-9]+)[^RP]*(?:P([0-9]+)|$)', activations)
    return sum(max(0.0, min(float(paused or end), end) - max(float(resumed), start))
               for resumed, paused in spans) if spans else unmarked


def seed_time(activations: str, completed: float, active: int, now: float) -> float | None:
    """Return for how long a complete item was seeded; None where that is not known."""
    if not completed:
        return None
    return time_started(activations, completed, now, now - completed if active else None)


def leech_time(activations: str, started: float, completed: float, now: float) -> float | None:
    """Return for how long an item was downloaded; None where that is not known."""
    end = completed or now
    return time_started(activations, 0, end, max(end - started, 0) if started else None)


def tracker_alias(url: str, aliases: dict[str, list[str]]) -> str:
    """Return a tracker's name by [ANNOUNCE], else the domain that its host belongs to.

    >>> tracker_alias('https://tracker.example.co.uk:80/x/announce', {})
    'example.co.uk'
    """
    server = re.match(r'(?:\w+://)?[^/]*', url)[0] + '/'        # type: ignore[index]
    for fits in (url.startswith, lambda part: (part + '/').startswith(server)):
        for alias, urls in aliases.items():
            if any(map(fits, urls)):            # else with another passkey
                return alias
    host = re.sub(r'^\w+://(?:[^/@]*@)?', '', url).partition('/')[0]
    host = re.sub(r':\d+$', '', host).lower()
    labels = host.split('.')
    if labels[-1].isdigit() or ':' in host:
        return host
    short = len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in (
        'co', 'com', 'net', 'org', 'ac', 'gov', 'edu')
    return '.'.join(labels[-3 if short else -2:])


def first_tracker(rows: list) -> str:
    """Return the first enabled announce URL."""
    return next((row[0] for row in rows if row[1] and row[0] != 'dht://'), '')


def file_kinds(rows: list, percent: int = 0) -> list[str]:
    """Return the extensions of files that make up at least so many percent of the data.

    The parts .r00, .r01 ... of an archive count as rar.
    """
    sizes: dict[str, int] = collections.Counter()
    for path, size in rows:
        sizes[re.sub(r'^r\d\d$', 'rar', os.path.splitext(path)[1].lstrip('.').lower())] += size
    total = sum(sizes.values()) or 1
    return sorted(kind for kind, size in sizes.items() if kind and size * 100 >= percent * total)


def name_traits(name: str, kind: str) -> dict[str, str]:
    """Return what a name tells: kind (tv, movie, audio ...), and show, season, title, year."""
    name, sort = name[:255], KINDS.get(kind, '')        # the patterns are quadratic
    for trait, regex in (('tv', TV), ('movie', MOVIE)):
        match = regex.match(os.path.splitext(name)[0] if kind and name.endswith(kind) else name)
        if match and sort in ('', 'video', 'misc'):
            return {'kind': trait, **match.groupdict('')}
    return {'kind': sort}


def guess_traits(name: str, rows: list) -> list[str]:
    """Return a classification such as ['tv', 'mkv'], empty where nothing is recognised."""
    kind = (file_kinds(rows, 51) or [''])[0]
    found = name_traits(name, kind)['kind']
    return [found, kind or 'other'] if found else []


def disk_of(path: str) -> tuple[int | None, int | None]:
    """Return the device that holds a path, or would, and its free bytes; None: not known."""
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    try:
        disk = os.statvfs(path)
        return os.stat(path).st_dev, disk.f_bavail * disk.f_frsize
    except (OSError, ValueError):
        return None, None


def same_fields(kind: str, names: str, value: Callable | None = None) -> dict[str, TorrentField]:
    """Return the fields of `name=command`, of the same kind; left out, the command is d.name."""
    return {name: TorrentField(kind, (f'd.{command or name}',), value) for name, _, command in
            (text.partition('=') for text in names.split())}


PATH = ('d.base_path', 'd.directory', 'd.name', 'd.is_multi_file')
STARTED = ('d.custom=tm_started', 'd.timestamp.started')
COMPLETED = ('d.custom=tm_completed', 'd.timestamp.finished')
TORRENT_FIELDS = {
    **same_fields('text', 'hash name message directory throttle=throttle_name '
                          'metafile=tied_to_file label=custom1'),
    **same_fields('size', 'size=size_bytes uploaded=up.total downloaded=down.total '
                          'left=left_bytes up=up.rate down=down.rate'),
    **same_fields('number', 'fno=size_files prio=priority peers=peers_connected'),
    **same_fields('number', 'ratio', lambda ratio: ratio / 1000),
    **same_fields('bool', 'is_open is_active is_complete=complete is_ignored=ignore_commands '
                          'is_private is_multi_file is_hashing=hashing', bool),
    **same_fields('tags', 'views'),
    **same_fields('tags', 'tagged=custom=tags', lambda tags: tags.lower().split()),
    'path': TorrentField('text', PATH, data_path),
    'realpath': TorrentField('text', PATH, lambda *raw: os.path.realpath(data_path(*raw)), True),
    'is_ghost': TorrentField('bool', PATH, lambda *raw: not os.path.lexists(data_path(*raw)), True),
    'free': TorrentField('size', PATH, lambda *raw: disk_of(data_path(*raw))[1], True),
    'sessionfile': TorrentField('text', ('session', 'd.hash'), lambda folder, info_hash:
                                f'{folder}{info_hash}.torrent' if folder else ''),
    'done': TorrentField('number', ('d.completed_bytes', 'd.size_bytes'), lambda done, size:
                         100.0 * done / size if size else 0.0),
    'xfer': TorrentField('size', ('d.up.rate', 'd.down.rate'), int.__add__),
    'loaded': TorrentField('time', ('d.custom=tm_loaded', 'd.load_date'), first_number),
    'started': TorrentField('time', STARTED, first_number),
    'completed': TorrentField('time', COMPLETED, first_number),
    'stopped': TorrentField(
        'time', ('d.custom=activations', 'd.state', 'd.state_changed', *STARTED),
        lambda marks, state, changed, *started: first_number(
            *re.findall(r'P([0-9]+)', marks)[-1:],
            0 if state or not first_number(*started) else changed)),
    'active': TorrentField('time', ('d.custom=last_active', 'd.peers_connected', 'now'),
                           lambda last, peers, now: int(now) if peers else first_number(last)),
    'last_xfer': TorrentField(
        'time', ('d.custom=last_xfer', 'd.up.rate', 'd.down.rate', 'now'),
        lambda last, up, down, now: int(now) if up or down else first_number(last)),
    'leechtime': TorrentField(
        'duration', ('d.custom=activations', *STARTED, *COMPLETED, 'now'),
        lambda marks, s1, s2, c1, c2, now:
        leech_time(marks, first_number(s1, s2), first_number(c1, c2), now)),
    'seedtime': TorrentField(
        'duration', ('d.custom=activations', *COMPLETED, 'd.complete', 'd.is_active', 'now'),
        lambda marks, c1, c2, complete, active, now:
        seed_time(marks, first_number(c1, c2), active, now) if complete else None),
    'tracker': TorrentField('text', ('trackers',), first_tracker),
    'alias': TorrentField('text', ('trackers', 'aliases'), lambda rows, aliases:
                          tracker_alias(first_tracker(rows), aliases)),
    'seeders': TorrentField('number', ('trackers',), lambda rows:
                            max([row[2] for row in rows], default=0)),
    'leechers': TorrentField('number', ('trackers',), lambda rows:
                             max([row[3] for row in rows], default=0)),
    'trackers_failed': TorrentField('number', ('trackers',), lambda rows:
                                    sum(1 for row in rows if row[1] and row[4] > row[5])),
    'files': TorrentField('files', ('files',), lambda rows: [row[0] for row in rows]),
    'kind': TorrentField('tags', ('files',), file_kinds),
    'traits': TorrentField('tags', ('d.name', 'files'), guess_traits)}


# Parts of the names of d. commands that change something, or the beginnings of parts
CHANGING = frozenset(
    'add check clear close create delete disable disconnect enable erase initialize insert open '
    'pause push remove resume save set start stop tracker_announce tracker_send_scrape try unset '
    'update'.split())


def torrent_field(name: str) -> TorrentField:
    """Return a field of the table; custom_KEY, kind_N and d_NAME are made as needed."""
    found = TORRENT_FIELDS.get(name)
    if found:
        return found
    stem, _, rest = name.partition('_')
    if stem == 'custom' and rest:
        key = rest.replace('\\', '\\\\').replace('"', '\\"')
        return TorrentField('text', (f'd.custom{rest}' if rest in [*'12345'] else
                                     f'd.custom="{key}"',))
    if re.fullmatch('kind_([0-9]{1,2}|100)', name):
        return TorrentField('tags', ('files',), lambda rows: file_kinds(rows, int(rest)))
    if re.fullmatch(r'd_[a-z][\w.]*', name):
        # As a column it would be done to every torrent
        if any(CHANGING.intersection((part, part.partition('_')[0])) for part in rest.split('.')):
            raise UserError(f'{name}: d.{rest} changes something: it is no field')
        return TorrentField('any', (f'd.{rest}',))
    raise UserError(f'{name!r} is no field of a torrent{nearest(name, TORRENT_FIELDS)}')


def fetch_columns(engine: Engine, view: str, needs: Iterable[str]) -> dict[str, tuple]:
    """Return what d. commands answer for all torrents of a view: command -> values."""
    columns = list(dict.fromkeys(needs))
    rows, size = engine.ask([('d.multicall2', '', view, *(
        need if '=' in need else need + '=' for need in columns)), ('view.size', '', view)])
    for answer in (rows, size):
        if isinstance(answer, RpcError):
            raise RpcError(f'view {view!r}: {answer}', answer.code)
    whole = rows if isinstance(rows, list) and {*map(type, rows)} <= {list} \
        and {*map(len, rows)} <= {len(columns)} else []
    if len(whole) != size:
        raise RpcError(f'{engine.address.where}: only {len(whole)} of the {size} items of view '
                       f'{view!r} were listed')
    return dict(zip(columns, zip(*whole) if whole else itertools.repeat(())))


def add_fields(torrents: list[Torrent], raw: dict, fields: dict[str, TorrentField]) -> None:
    """Work out fields of torrents from the raw values, one for each torrent."""
    for name, field in fields.items():
        columns = [raw[need] for need in field.needs]
        for torrent, value in zip(torrents, map(field.value, *columns) if field.value else
                                  columns[0]):
            torrent[name] = value


def list_torrents(engine: Engine, view: str, fields: Iterable[str],
                  condition: Any = None) -> list[Torrent]:
    """Return the torrents of a view that meet a Filter, with hash, name and the given fields.

    One round trip, and one more where slow fields are needed. Raises RpcError, also when the
    list is shorter than the view: half a list must not pass for the whole.
    """
    engine.reach()                              # for its session_path
    now = time.time()
    tested = condition.fields if condition else ()
    left = {name: torrent_field(name) for name in ['hash', 'name', *tested, *fields]}
    raw: dict = {'now': itertools.repeat(now), 'aliases': itertools.repeat(engine.aliases),
                 'session': itertools.repeat(engine.session_path)}
    raw.update(fetch_columns(engine, view, [need for field in left.values() for need in field.needs
                                            if need not in raw and need not in SOURCES]))
    torrents = [Torrent() for _ in raw['d.hash']]

    def keep(wanted: list) -> None:
        torrents[:] = itertools.compress(torrents, wanted)
        for need in raw:
            raw[need] = list(itertools.compress(raw[need], wanted))

    if condition:
        add_fields(torrents, raw, {name: left.pop(name) for name in tested
                                   if not left[name].slow})
        keep([condition.cheap(torrent, now) for torrent in torrents])
    for source, (method, cells) in SOURCES.items():
        if any(source in field.needs for field in left.values()):
            raw[source] = engine.ask((method, item, '', *cells) for item in raw['d.hash'])
            keep([not isinstance(rows, HashNotFound) for rows in raw[source]])
            for rows in raw[source]:
                if isinstance(rows, RpcError):
                    raise rows
    add_fields(torrents, raw, left)
    return [torrent for torrent in torrents if condition.match(torrent, now)] \
        if left.keys() & tested else torrents


# --- Filter and template ---------------------------------------------------------------------
# Two small languages of the ini. A condition becomes closures over a row (a mapping of field
# name to value) and `now` in Unix seconds; NOT is carried down to the single conditions, so
# that a value which is not known matches neither a condition nor its opposite. A template is
# text, expressions and branches; what an expression gives is data: the text around it is split
# into arguments first. A mistake is shown with `<-- here` after its place.

AGE_UNITS = {'y': 31536000, 'M': 2592000, 'w': 604800, 'd': 86400, 'h': 3600, 'i': 60, 's': 1}
ORDER = {'=': operator.eq, '<': operator.lt, '<=': operator.le, '>': operator.gt,
         '>=': operator.ge}
MOST_CHARACTERS, MOST_STARS, MOST_DEPTH = 4000, 6, 50
PLAIN_NUMBER = re.compile(r'-?[0-9]{1,18}(\.[0-9]{1,18})?')
# A word is a keyword or pieces, some of them quoted. Only where a value begins, /.../ is a
# regex: it may hold quotes and (without < = >) spaces, and keeps its backslashes.
QUOTED = (r'((?<![^\s=<>!~,])/(?:(?:\\.|(?!\s(?:OR|NOT|[][])\s)[^/\\<=>])*|\S*)/i?(?=[\s,]|$))'
          r'''|"((?:\\.|[^"\\])*)"|'([^']*)'|\\(.)''')
PIECE = re.compile(QUOTED, re.S)
WORD = re.compile(r'\s*(?:(\[|\]|OR|NOT)(?!\S)|(!)|((?:%s|[^\s"\'\\])+))' % QUOTED, re.S)
CONDITION = re.compile(r'([A-Za-z_][\w.-]{0,99})(<>|<=|>=|!=|==|<|>|=|~)(.*)', re.S)
ANY_OF = re.compile(r'(!?/(?:\\.|[^/\\])*/i?|[^,]*),', re.S)


def mistake(what: str, text: str, at: int, why: Any) -> UserError:
    """Return the error that shows a text of the user with a mark at the place."""
    before, after = ' '.join(text[:at].split()), ' '.join(text[at:].split())
    before = before if len(before) < 90 else '...' + before[-87:]
    after = after if len(after) < 40 else after[:37] + '...'
    return UserError(f'{what} {quoted(f"{before} <-- here {after}".strip(), 600)}: {why}')


def pattern(text: str) -> Callable[[str], Any]:
    """Return what finds a /regex/, or matches a glob as a whole; the case does not matter."""
    regex = re.fullmatch('/(.*)/i?', text, re.S)
    glob = '' if regex else re.sub(r'\*+', '*', text)
    if len(text) > 500 or glob.count('*') > MOST_STARS or '{{' in glob:
        raise UserError(f'allowed are a /regex/, or a glob of {MOST_STARS} stars, no template')
    bare = re.sub(r'\\.|\[\^?\]?(?:\\.|[^]\\])*\]', 'x', regex[1] if regex else '')
    if re.search(r'\((?:[^()]*[*+]|[^()]*\([^()]*[*+][^()]*\))[^()]*\)[*+{]', bare):
        raise UserError('a repeat in a repeated group can take for ever; allowed is e.g. (ab)+, '
                        'not (a+)+')                    # only the usual slip is caught
    try:
        found: Callable[[str], Any] = re.compile(regex[1], re.I).search if regex else \
            re.compile(fnmatch.translate(glob), re.I).match
        if regex or '[' not in glob:
            return found                                # [x] as it stands is meant, too
        return lambda value: found(value) or value.lower() == text.lower() or None
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise UserError(f'{quoted(text)} is not a regex or glob: {error}') from None


def parse_age(text: str) -> int | None:
    """Return the seconds in an age, None for what is written as something else.

    >>> parse_age('1d12h'), parse_age('1h30m'), parse_age('2024-03-15')
    (129600, 5400, None)
    """
    text = re.sub(r'(?<=[wdhWDH])([0-9]+)m', r'\1i', text)      # after w d h it is no month
    if not re.fullmatch('(?:[0-9]{1,6}[A-Za-z])+', text):
        return None
    parts = [(int(number), unit if unit in 'mM' else unit.lower())
             for number, unit in re.findall('([0-9]+)([A-Za-z])', text)]
    units = {unit for _, unit in parts}
    if 'm' in units:
        raise UserError('m is months to pyrocore and minutes to pyrosimple; '
                        'allowed are M for months and i for minutes')
    if not units <= AGE_UNITS.keys() or len(units) < len(parts):
        raise UserError(f'{quoted(text)} is not an age; allowed are y M w d h i s, each once')
    return sum(number * AGE_UNITS[unit] for number, unit in parts)


def parse_time(text: str) -> float:
    """Return the Unix seconds of a local date, or of Unix seconds: a number below 10^8 (1973)
    is an age that lost its unit."""
    if re.fullmatch('0|[1-9][0-9]{8,11}', text):
        return int(text)
    form = '%m/%d/%Y' if '/' in text else '%d.%m.%Y' if '.' in text else '%Y-%m-%d'
    text = text.upper().replace(' ', 'T')
    form += 'T%H:%M:%S'[:3 + 3 * text.count(':')] if 'T' in text else ''
    try:
        return time.mktime(time.strptime(text, form))
    except (ValueError, OverflowError):
        raise UserError(f'{quoted(text)} is not a time; allowed are e.g. 2w 1d12h 2024-03-15 '
                        '03/15/2024 15.03.2024T14:50, Unix seconds') from None


def compare_test(kind: str, op: str, text: str) -> Callable:
    """Return the test of a number, size, time or duration: (found, now) -> bool."""
    if op == '=' and text[:1] in ('+', '-'):
        op, text = ('>' if text[0] == '+' else '<'), text[1:]
    compare = ORDER[op]
    if kind in ('number', 'any') and not PLAIN_NUMBER.fullmatch(text) or len(text) > 40:
        raise UserError(f'{quoted(text)} is not a number; allowed are e.g. 2 and 1.5')
    if kind == 'any':
        return lambda found, now: (PLAIN_NUMBER.fullmatch(str(found)) is not None
                                   and compare(float(found), float(text)))
    if kind in ('number', 'size'):
        limit = float(text) if kind == 'number' else parse_size(text)
        return lambda found, now: compare(found, limit)
    age = parse_age(text)
    if op == '=' and not text.isdigit():
        raise UserError(f'{quoted(text)} does not go with =; allowed are < <= > >= =+ =-')
    if kind == 'time' and age is not None:
        return lambda found, now: compare(now - found, age)
    if kind == 'duration' and age is None and text != '0':
        raise UserError(f'{quoted(text)} is not a length of time; allowed are e.g. 8w 1d12h')
    limit = parse_time(text) if age is None else age
    return lambda found, now: compare(found, limit)


def value_test(kind: str, op: str, text: str) -> Callable:
    """Return the test of one value of a condition: (found, now) -> bool."""
    if kind == 'any' and op == '=' and text.lower() in ('yes', 'no', 'true', 'false'):
        raise UserError(f'{text!r} is nothing that a command answers; allowed are 1 and 0')
    if kind in ('number', 'size', 'time', 'duration') or kind == 'any' and (
            op != '=' or PLAIN_NUMBER.fullmatch(text[1:]) and text[0] in '+-'):
        return compare_test(kind, op, text)
    if op != '=':
        raise UserError(f'{op} does not go with {kind}; allowed are = and !=')
    if kind == 'bool':
        wanted = parse_bool(text)
        return lambda found, now: bool(found) is wanted
    alone = kind == 'tags' and text.startswith(':')
    match = pattern(text[1:] if alone else text)
    if kind not in ('tags', 'files'):
        return lambda found, now: match(str(found)) is not None
    if text in ('', ':'):
        return lambda found, now: not found
    if alone:
        return lambda found, now: bool(found) and all(map(match, found))
    return lambda found, now: any(map(match, found))


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
    unknown = (None, 0) if field.kind == 'time' and text.lstrip('+-') != '0' else (None,)
    test = value_test(field.kind, op, text)

    def holds(row: Mapping, now: float, possible: bool) -> bool:
        found = row.get(name)
        if found in unknown:
            return possible and name not in row
        return test(found, now) is not negated
    return Node(holds, int(field.slow))


def joined(nodes: list[Node], every: bool) -> Node:
    """Return the Node of all or any of some, the cheap ones first."""
    if len(nodes) == 1:
        return nodes[0]
    nodes = sorted(nodes, key=lambda node: node.cost)
    tests = [node.test for node in nodes]

    def holds(row: Mapping, now: float, possible: bool) -> bool:
        for test in tests:
            if test(row, now, possible) is not every:
                return not every
        return every
    return Node(holds, sum(node.cost for node in nodes))


def unquoted(piece: re.Match) -> str:
    """Return a piece of a word as what it stands for."""
    regex, double, single, escaped = piece.groups()
    return regex or single or escaped or re.sub(r'\\(["\\])', r'\1', double or '')


class Filter:
    """An rtcontrol condition, compiled; `fields` are the names it needs, the slow ones are
    looked at last.

    >>> Filter('ratio>2 is_complete=yes').match({'ratio': 2.5, 'is_complete': True})
    True
    """

    def __init__(self, text: str):
        self.text, self.at = text, 0                    # at: end of the word in hand
        self.needs: dict[str, TorrentField] = {}
        try:
            self.root = self.parse(self.words(), False, 0)
        except UserError as error:
            raise mistake('condition', text, self.at, error) from None
        self.fields = tuple(self.needs)

    def match(self, row: Mapping, now: float | None = None) -> bool:
        """Tell whether a row meets the condition; ages count back from `now`."""
        return self.root.test(row, time.time() if now is None else now, False)

    def cheap(self, row: Mapping, now: float | None = None) -> bool:
        """Tell whether a row may meet the condition once it has the fields that it lacks."""
        return self.root.test(row, time.time() if now is None else now, True)

    def words(self) -> Iterator[tuple]:
        """Give the words as (keyword or nothing, text without its quotes)."""
        if len(self.text) > MOST_CHARACTERS:
            raise UserError(f'this is too long; allowed are {MOST_CHARACTERS} characters')
        while self.at < len(self.text.rstrip()):
            word = WORD.match(self.text, self.at)
            if not word:
                raise UserError('after this, a quote has no other half')
            self.at = word.end()
            yield word[2] and 'NOT' or word[1], PIECE.sub(unquoted, word[3] or '')
        yield 'END', ''

    def parse(self, words: Iterator[tuple], negated: bool, depth: int) -> Node:
        """expr ::= term ( 'OR' term )*;  term ::= factor+
        factor ::= ( 'NOT' | '!' ) factor | '[' expr ']' | condition"""
        if depth > MOST_DEPTH:
            raise UserError(f'brackets are nested too deep; allowed are {MOST_DEPTH}')
        terms: list[Node] = []
        factors: list[Node] = []
        flip, last = negated, ''
        for key, text in words:
            if key == 'NOT':
                flip = not flip
            elif key == '[' or not key:
                factors.append(self.parse(words, flip, depth + 1) if key else
                               self.condition(text, flip))
                flip = negated
            elif not factors or last == 'NOT':
                raise UserError('a condition is missing; allowed are e.g. ratio>2 *name* [ ... ]')
            else:
                terms.append(joined(factors, not negated))
                factors = []
                if key != 'OR':
                    break
            last = key
        if (key == ']') is not (depth > 0):
            raise UserError('a bracket without its other half; [ and ] stand between spaces')
        return joined(terms, negated)                   # neither a nor b: not a, and not b

    def condition(self, text: str, negated: bool) -> Node:
        """condition ::= field op value | value;  value may be several, with commas"""
        match = CONDITION.fullmatch(text)
        if not match and (text in TORRENT_FIELDS or re.search(
                r'^(?!/).*[=<>]|^(and|or|not|[&|]+|[][]|\]?(or|not|and)?\[|\](or|not|and))$',
                text, re.S | re.I)):
            raise UserError('this is no condition; allowed are field=value without spaces, a glob, '
                            'NOT, OR, [ ... ] between spaces; side by side means and')
        name, op, value = match.groups() if match else ('name', '=', text)
        field = self.needs[name] = torrent_field(name)
        negated = negated is not (op in ('!=', '<>'))
        if op == '~':                                   # as in pyrocore
            value = f'/{value}/'
        elif op == '==' and field.kind == 'tags':       # this one and no other
            value = ':' + value
        op = '=' if op in ('==', '!=', '<>', '~') else op
        parts = ANY_OF.findall(value + ',') if op == '=' else [value]
        if '' in parts and len(parts) > 1:
            raise UserError('a value is missing beside a comma')
        return joined([leaf(name, field, op, part, negated) for part in parts], negated)


TAG = re.compile(r'(\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\})', re.S)
BRANCH = re.compile(r'(if|elif|else|endif)\b\s*(.*?)\s*:?', re.S)
ELSE = ast.Constant(True)               # the condition of an else
MOST_EXPRESSION = 300
MARK = '\0'                             # stands for a value while the text around it is split
COMMAND = re.compile(r'(?:(?<![^=,\s])"(?:[^"\\]|\\.)*"|\\.|[^;\n\\])+', re.S)
ARGUMENT = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|([^,"({\\\s](?:[^,\\]|\\.)*)?)\s*,', re.S)
# Commands that take arguments as data; others (multicall, branch ...) would run them.
DATA_COMMAND = re.compile(r'[dfpt]\.(?!multicall)[\w.]+|view\.set_(not_)?visible|print|execute.*')
INTERPRETER = re.compile(         # each runs text that it is given
    r'((ba|da|a|z|k|fi|c|tc)?sh|su|runuser|sudo|doas|env|python[0-9.]*|perl|ruby|node|php|lua)')
SCRIPT_FLAG = re.compile('-[A-Za-z]*[ceS]|--(command|eval|split-string)')


def show(value: Any) -> str:
    """Return a value as text: None is nothing, yes is 1, tags stand side by side."""
    if isinstance(value, (list, tuple, set, frozenset)):
        ordered = value if isinstance(value, (list, tuple)) else sorted(value, key=str)
        return ' '.join(map(show, ordered))
    return '' if value is None else str(int(value) if isinstance(value, bool) else value)


def part_of(value: Any, name: str, other: Any = None) -> Any:
    """Return a named part of a mapping; whatever else it is has none."""
    found = value.get(name) if isinstance(value, Mapping) else None
    return other if found is None else found


COMPARE = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
           ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda part, whole: part in whole,
           ast.NotIn: lambda part, whole: part not in whole}


def compares(op: ast.cmpop, one: Any, other: Any) -> bool:
    """Tell whether a comparison holds; what cannot be compared does not."""
    try:
        return bool(COMPARE[type(op)](one, other))
    except TypeError:
        return isinstance(op, ast.NotIn)


FILTERS: dict[str, Callable] = {
    'lower': str.lower, 'upper': str.upper, 'title': str.title, 'replace': str.replace,
    'basename': os.path.basename, 'dirname': os.path.dirname,
    'stem': lambda text: os.path.splitext(os.path.basename(text))[0],
    'size': show_size, 'duration': show_duration, 'get': part_of,
    'date': lambda when: time.strftime('%F %T', time.localtime(when)) if when else '',
    'default': lambda value, other='': value if value or value == 0 else other}
UNTEXTED = ('size', 'duration', 'date', 'default', 'get')       # they take values as they are
OLD_FILTERS = {'pathbase': 'basename', 'pathdir': 'dirname', 'pathname': 'stem', 'sz': 'size',
               'iso': 'date'}           # pyrocore's names
FILTER_ARGUMENTS = {'replace': (2,), 'get': (1, 2), 'default': (0, 1)}


def filter_call(node: Any) -> tuple[str, list]:
    """Return (filter, operands) of a|filter, a|filter(x), a|h.filter or a.filter(x)."""
    piped = isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)
    call = node.right if piped else node
    callee = call.func if isinstance(call, ast.Call) else call if piped else None
    name = getattr(callee, 'attr', getattr(callee, 'id', ''))
    name = OLD_FILTERS.get(name, name)
    value, args = node.left if piped else getattr(callee, 'value', None), getattr(call, 'args', [])
    if not value or name not in FILTERS or getattr(call, 'keywords', None):
        raise UserError(f'{name or type(node).__name__} is not possible; allowed are names, '
                        f'literals, and or not in, comparisons, | with {" ".join(FILTERS)}')
    if len(args) not in FILTER_ARGUMENTS.get(name, (0,)):
        raise UserError(f'{name} does not take {len(args)} arguments')
    return name, [value, *args]


def evaluate(node: Any, values: Mapping) -> Any:
    """Return what an expression gives. All of it is looked at, so that one call with an empty
    defaultdict finds its mistakes and its names. A name without a value is a KeyError.

    Allowed are names, a.b of mappings, literals, and or not, comparisons, a|filter(x), and the
    filters as methods, a.replace('.', ' '). Nothing reaches an object of Python.
    """
    def each(nodes: Iterable) -> list:
        return [evaluate(part, values) for part in nodes]
    if isinstance(node, ast.Constant) or isinstance(getattr(node, 'op', None), ast.USub):
        return ast.literal_eval(node)
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.Attribute) and not node.attr.startswith('_'):
        if getattr(node.value, 'id', '') in ('item', 'd', 'i'):
            return values[node.attr]                    # the item is what the values are of
        if node.attr in {*FILTERS, *OLD_FILTERS} and getattr(node.value, 'id', '') != 'traits':
            raise UserError(f'{node.attr} is a filter; write |{node.attr}')
        return part_of(evaluate(node.value, values), node.attr)
    if isinstance(node, (ast.Tuple, ast.List)):
        return each(node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not evaluate(node.operand, values)
    if isinstance(node, ast.BoolOp):
        found, decides = each(node.values), isinstance(node.op, ast.Or)
        return next((part for part in found[:-1] if bool(part) is decides), found[-1])
    if isinstance(node, ast.Compare) and all(type(op) in COMPARE for op in node.ops):
        found = each([node.left, *node.comparators])
        return all(map(compares, node.ops, found, found[1:]))
    name, operands = filter_call(node)
    operands = each(operands)
    if operands[0] is None and name not in ('default', 'get'):
        return None
    return FILTERS[name](*operands if name in UNTEXTED else map(show, operands))


class Template:
    """Text with {{expression}}, {{if}} ... {{endif}} and {{# comment }}.

    known: the names there will be, where that is known; others are refused. `names` are those
    it needs: item.name is `name`.

    >>> Template('{{if ratio > 1}}{{item.name|upper}}{{endif}}').render({'ratio': 2, 'name': 'a'})
    'A'
    """

    def __init__(self, text: str, known: Any = None):
        self.text, self.known = text, known
        self.at = self.widest = 0                       # end of the tag in hand; most branches
        self.seen: dict = collections.defaultdict(lambda: None)
        try:
            self.nodes, word, _ = self.block(iter(TAG.split(text)), 0)
            if word or MARK in text:
                raise UserError(f'{word} without if' if word else 'a NUL is not possible')
            for branch in range(self.widest + 1):       # what rendering would meet
                self.divide(self.marked(self.seen, branch)[0])
        except UserError as error:
            raise mistake('template', text, self.at, error) from None
        self.names = tuple(self.seen)

    def block(self, parts: Iterator[str], depth: int) -> tuple[list, str, str]:
        """Return the nodes up to elif, else, endif or the end; that word; its condition.
        A node is text, an ast of an expression, or of an if [(ast, nodes), ...]."""
        nodes: list = []
        for part in parts:
            self.at += len(part)
            code = part[2:-2].strip('- \t\r\n' if part[1:2] == '%' else None)
            branch = BRANCH.fullmatch(code)
            if not TAG.fullmatch(part):
                nodes.append(part)
                if '{{' in part or '{%' in part:
                    raise UserError('a {{ or {% in this is not closed')
            elif part[1] == '#' or part[2] == '#':
                continue
            elif branch and branch[1] != 'if':
                return nodes, branch[1], branch[2]
            elif branch:
                nodes.append(self.branches(branch[2], parts, depth + 1))
            else:
                nodes.append(self.expression(code if part[1] == '{' else part))
        return nodes, '', ''

    def branches(self, code: str, parts: Iterator[str], depth: int) -> list:
        """Return [(ast, nodes), ...] of an if."""
        if depth > MOST_DEPTH:
            raise UserError(f'ifs are nested too deep; allowed are {MOST_DEPTH}')
        branches, word = [], 'if'
        while word != 'endif':
            test = ELSE if word == 'else' else self.expression(code)
            nodes, word, code = self.block(parts, depth)
            branches.append((test, nodes))
            if code and word in ('else', 'endif'):
                raise UserError(f'{word} takes no condition; write elif')
            if not word or test is ELSE and word != 'endif':
                raise UserError(f'{word} after else' if word else 'an if has no endif')
        self.widest = max(self.widest, len(branches))
        return branches

    def expression(self, code: str) -> ast.AST:
        """Return the ast of an expression whose parts and names are allowed."""
        try:
            tree = ast.parse(code if len(code) <= MOST_EXPRESSION else '', mode='eval').body
            evaluate(tree, self.seen)
        except (SyntaxError, TypeError, ValueError, OverflowError, OSError, MemoryError,
                RecursionError, Warning):
            raise UserError(f'{quoted(code, 60)} is no expression; allowed are e.g. label, '
                            "label|default('x'), 'TV' in flags and not is_private") from None
        for name in self.seen:
            made = self.known is TORRENT_FIELDS and re.match('item$|(custom|kind|d)_', name)
            if self.known is not None and name not in self.known and not made:
                raise UserError(f'there is no {quoted(name)} here{nearest(name, self.known)}')
        return tree

    def marked(self, values: Mapping, branch: int | None = None) -> tuple[str, Callable]:
        """Return the text with a MARK for each value, and what puts the next values into a
        part of it; with `branch`, that one of each if is taken."""
        shown: list[str] = []

        def pieces(nodes: list) -> Iterator[str]:
            """Give the texts, and a MARK for each value."""
            for node in nodes:
                if isinstance(node, str):
                    yield node
                elif isinstance(node, list):
                    bodies = [body for number, (test, body) in enumerate(node) if (
                        evaluate(test, values) if branch is None else number == branch)]
                    yield from pieces(bodies[0] if bodies else [])
                else:
                    shown.append(show(evaluate(node, values)))
                    yield MARK
        try:
            text, left = ''.join(pieces(self.nodes)), iter(shown)
            return text, lambda part: re.sub(MARK, lambda mark: next(left), part)
        except (KeyError, TypeError, ValueError, OverflowError, OSError, RecursionError) as error:
            why = 'there is no ' if isinstance(error, KeyError) else ''
            raise LoggableError(f'template {quoted(self.text, 80)}: {why}{error}') from None

    def divide(self, text: str) -> list:
        """Return what the text is split into before the values are put in."""
        return [text]

    def render(self, values: Mapping) -> Any:
        """Return the text, values put in; LoggableError where one is missing."""
        text, fill = self.marked(values)
        return fill(text)


def check_words(words: list[str]) -> None:
    """Refuse a value inside what a shell or the like would run: no quoting is safe there."""
    names = [os.path.basename(word) for word in words]
    script = any(map(INTERPRETER.fullmatch, names)) and any(
        SCRIPT_FLAG.match(flag) and (MARK in flag + word or word[:1] in '-+')
        for flag, word in zip(words, [*words[1:], 'x']))
    if MARK in ''.join(words) and (script or 'ssh' in names):
        raise UserError('a value in a script for a shell or the like is run with it; allowed is '
                        """sh -c '... "$1"' sh {{name}}""")


# Commands as they were called up to 0.8, in the configurations of that time.
OLD_COMMAND = re.compile(r'\b([dfpt])\.([gs]et)_(?!(?:create|resize)_queued=)(\w+)=')


class CommandTemplate(Template):
    r"""Commands of rTorrent, separated by ; or line breaks; one without values stays as it is.

    >>> print(CommandTemplate('d.custom.set=dir,/done/{{a}}').render({'a': 'x "y", z'}))
    d.custom.set="dir","/done/x \"y\", z"
    """

    def divide(self, text: str) -> list:
        """Return (text, nothing) or (`name=`, arguments) of each command, values still marks."""
        return [self.command(part.strip()) for part in COMMAND.findall(text) if part.strip()]

    def command(self, text: str) -> tuple[str, list]:
        """Return one command, divided."""
        text = OLD_COMMAND.sub(lambda old: f'{old[1]}.{old[3]}' + '.set' * (old[2] == 'set') + '=',
                               text)
        name, equals, rest = text.partition('=')
        if not equals or not re.fullmatch(r'[A-Za-z_][\w.]*\s*', name):
            raise UserError(f'{quoted(text.replace(MARK, "{{..}}"), 60)} is not a command; '
                            'allowed is name=argument,...')
        if MARK not in rest:
            return text, []
        matches = list(ARGUMENT.finditer(rest + ','))
        words = [re.sub(r'\\(.)', r'\1', match[1] or (match[2] or '').strip()) for match in matches]
        if not DATA_COMMAND.fullmatch(name.strip()):
            raise UserError(f'{name} might run the value; allowed are e.g. d.custom.set, print')
        if ''.join(match[0] for match in matches) != rest + ',' or any(
                word[0] == '$' and MARK in word for word in words if word):
            raise UserError('a value beside ( { $ or an open quote; allowed are words and "..."')
        if name.startswith('execute'):
            check_words(words)
        return name.strip() + '=', words

    def commands(self, values: Mapping) -> list[str]:
        """Return the commands, each fit for load.*; none where all is empty."""
        text, fill = self.marked(values)
        return [name + ','.join(self.argument(word, fill(word)) for word in words)
                for name, words in self.divide(text)]

    def render(self, values: Mapping) -> str:
        """Return the commands as one text, which load.* takes too."""
        return ' ; '.join(self.commands(values))

    @staticmethod
    def argument(word: str, text: str) -> str:
        """Return an argument quoted as a whole. rTorrent RUNS one that begins with $, quoted or
        not; (cat,{"..."}) keeps it as it is (seen on 0.9.8 and 0.16.17)."""
        plain = '"' + text.replace('\\', '\\\\').replace('"', '\\"') + '"'
        return f'(cat,{{{plain}}})' if MARK in word and text.startswith('$') else plain


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
        if not words or MARK in words[0]:
            raise UserError('the program is missing, or depends on a value')
        check_words(words)
        return words

    def render(self, values: Mapping) -> list[str]:
        """Return the arguments; LoggableError for a value that would pass for an option."""
        text, fill = self.marked(values)
        args: list[str] = []
        for word in self.divide(text):
            args.append(fill(word))
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

    engine is the job's rTorrent. state_dir is where it may keep a file.
    """
    engine: Any
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
        return without_errors(self.engine.tell([(method, *params)]))[0]


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


def sync(path: str) -> None:
    """Have a file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Let what goes wrong in here be one line that names the file."""
    try:
        yield
    except OSError as error:
        raise LoggableError(f'{path} cannot be written: {error.strerror}') from None


def open_private(path: str) -> Any:
    """Open a file of the user's own to be written, in a folder of his own, made if need be."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    return open(path, 'w', encoding='utf-8',
                opener=lambda path, flags: os.open(path, flags, 0o600))


def replace_file(path: str, text: str) -> None:
    """Write a file of the user's own, whole or not at all, whatever happens meanwhile."""
    with writing(path):
        with open_private(path + '.new') as stream:
            stream.write(text)
        sync(path + '.new')
        os.replace(path + '.new', path)


def parse_pairs(text: str) -> dict[str, str]:
    """Return what stands in `name=value, name=value`."""
    pairs = {part.partition('=')[0].strip(): part.partition('=')[2].strip()
            for part in text.split(',') if part.strip()}
    if not all(name and value for name, value in pairs.items()):
        raise UserError(f'{text!r} is not understood; allowed is name=value, name=value')
    return pairs


def parse_form(form: str, what: str, text: str) -> str:
    """Return the first group of a regex that text has to match; what: what it should have been."""
    found = re.fullmatch(form, text)
    if not found:
        raise UserError(f'{redacted(text)!r} is no {what}')
    return found[1]


parse_web_url = functools.partial(
    parse_form, r'(https?://[^/@\s]+(?:/\S*?)?)/*', 'web address; allowed is http(s)://host:port, '
    'with user and password as settings')
parse_ping_url = functools.partial(
    parse_form, r'(https?://[\w.-]+(?::\d+)?(?:[/?]\S*)?|https?://\[[\da-fA-F:]+\]\S*|)',
    'web address; allowed is http(s)://host/..., without user and password')
parse_api = functools.partial(
    parse_form, '([123]?)', 'version of the interface; allowed are 1, 2, 3')


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
            memory = dict(re.findall(r'(\w+): +(\d+) kB', stream.read()))
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
                        if re.fullmatch(r'\S.* \S.* \d+', line)]
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
    """What jobs share that work on the torrents of a view that meet a condition."""
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

    def hold_back(self, before: list[Torrent], after: list[Torrent], why: str) -> list[Torrent]:
        """Log which torrents are left alone for now; return the others."""
        kept = {torrent['hash'] for torrent in after}
        left = [torrent for torrent in before if torrent['hash'] not in kept]
        for torrent in left:
            self.LOG.log(logging.INFO if self.dry_run else logging.DEBUG,
                         'held back: %s: %s', torrent, why)
        if left and self.deletes and not self.dry_run:
            self.LOG.info('%d held back: %s', len(left), why)
        return after

    def each(self, torrents: list[Torrent], work: Callable[[Torrent], Any],
             most: int | None = None) -> None:
        """Do the work on torrents, so many at most; one that fails costs its own turn only.

        Work that says False had nothing to do, which does not count either.
        After a while they are looked at again: the user may have changed them meanwhile.
        """
        failures, done, listed = [], 0, elapsed_time()
        current = {torrent['hash']: torrent for torrent in torrents}
        for at, torrent in enumerate(torrents):
            if done == most:                    # one that failed does not count
                self.hold_back(torrents[at:], [], f'the limit is {most}')
                break
            if elapsed_time() - listed > self.FRESH:
                current = {found['hash']: found for found in self.chosen()}
                listed = elapsed_time()
            if torrent['hash'] not in current:
                self.LOG.info('%s does not meet the condition any more', torrent)
                continue
            try:
                done += work(current[torrent['hash']]) is not False
            except Unreachable:
                raise
            except (LoggableError, OSError, ValueError) as error:       # of a path with a NUL, say
                self.LOG.warning('%s: %s', torrent, error)
                failures.append(error)
        if failures:
            raise LoggableError(f'{len(failures)} torrents failed, the last: {failures[-1]}')


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
                proxy.print('', f"torque: started {quoted(torrent['name'])}")


def erase(args: str, item: Torrent) -> list:
    """Return the commands that take an item out of rTorrent."""
    return [('d.stop',), ('d.close',), ('d.erase',)]


# action -> fields that it needs, and what makes of its args and an item the commands with the
# item's hash, none where there is nothing to do
DO: dict[str, tuple[str, Callable[[str, Torrent], list]]] = {
    'start': ('is_active', lambda args, item: [('d.start',)] * (not item['is_active'])),
    'stop': ('is_active d_state', lambda args, item: [('d.stop',)] * bool(
        item['is_active'] or item['d_state'])),
    'close': ('is_open d_state', lambda args, item: [('d.stop',), ('d.close',)] * bool(
        item['is_open'] or item['d_state'])),
    'open': ('is_open', lambda args, item: [('d.open',)] * (not item['is_open'])),
    'hash_check': ('', lambda args, item: [('d.check_hash',)]),
    'ignore': ('is_ignored', lambda args, item: [('d.ignore_commands.set', 1)] * (
        not item['is_ignored'])),
    'heed': ('is_ignored', lambda args, item: [('d.ignore_commands.set', 0)] * item['is_ignored']),
    'delete': ('is_hashing', erase),
    'cull': ('is_hashing path is_multi_file is_complete done d_base_path', erase),
    'tag': ('tagged', lambda args, item: change_tags(set.union, args, item)),
    'untag': ('tagged', lambda args, item: change_tags(set.difference, args, item)),
    'custom': ('', lambda args, item: [
        (f'd.custom{key}.set', value) if re.fullmatch('[1-5]', key) else
        ('d.custom.set', key, value) for key, _, value in [args.partition('=')]]),
    'prio': ('prio', lambda args, item: [
        ('d.priority.set', int(args)), ('d.update_priorities',)] * (item['prio'] != int(args))),
    'throttle': ('throttle is_active', lambda args, item: [] if item['throttle'] == args else [
        *[('d.stop',)] * item['is_active'], ('d.throttle_name.set', args),
        *[('d.start',)] * item['is_active']]),
    'exec': ('', lambda args, item: []), 'log': ('', lambda args, item: [])}
WITH_ARGS = ('tag', 'untag', 'custom', 'prio', 'throttle', 'exec', 'log')       # log may have some


def change_tags(change: Callable, args: str, item: Torrent) -> list:
    """Return the command that changes the tags of an item; none where that changes nothing."""
    tags = change({*item['tagged']}, args.lower().replace(',', ' ').split())
    return [] if tags == {*item['tagged']} else [('d.custom.set', 'tags', ' '.join(sorted(tags)))]


def parse_word(known: Iterable[str], text: str) -> str:
    """Return a word that has to be one of those known."""
    if text not in known:
        what = f'{text!r} is not known' if text else 'is not set'
        raise UserError(f"{what}; allowed are {' '.join(known)}{nearest(text, known)}")
    return text


def lies_in(path: str, folder: str) -> bool:
    """Tell whether a path is a folder or below it, both real paths."""
    return os.path.commonpath([path, folder]) == os.path.commonpath([folder])       # // is /


def links_below(folder: str) -> Iterator[str]:
    """Give the symbolic links in a folder."""
    left = [folder]
    while left:
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    yield entry.path
                elif entry.is_dir():
                    left.append(entry.path)


# These may stand for anything else that is on the disk: some rTorrents put them for others.
MANGLED = re.compile('(?:[?\ufffd]|%[0-9A-Fa-f]{0,2})+')


def may_be(path: str) -> list[str]:
    """Return a path, and what is on the disk that it may mean, too, where it is mangled."""
    import glob
    parts = MANGLED.split(path)
    return [path, *(found for found in glob.glob('*'.join(map(glob.escape, parts)))
                    if not (found.isascii() and found.isprintable()))] if parts[1:] else [path]


def places_in_use(engine: Engine) -> list[tuple[str, str, str]]:
    """Return (hash, path, real path) of all items' data, and of the links in it.

    The real path is empty where a path is not absolute.
    """
    return [(item['hash'], path, os.path.isabs(path) and os.path.realpath(path) or '')
            for item in list_torrents(engine, 'default', ['path']) if item['path']
            for place in may_be(item['path']) for path in (place, *links_below(place))]


def used_by_other(used: list[tuple[str, str, str]], hashes: Iterable[str], *places: str) -> str:
    """Return a path by which an item other than these may use data at places, '' for none."""
    reals = [os.path.realpath(place) for place in places]
    return next((path for item, path, found in used if item not in hashes and (
        not found or any(lies_in(found, real) or lies_in(real, found) for real in reals))), '')


def item_files(engine: Engine, torrent: Torrent, base: str, whole: bool = False) -> list[str]:
    """Return the files of an item that exist at `base`, by rTorrent's own list of them.

    Raises LoggableError where that is doubtful, as before rTorrent has opened it or has found
    a piece of it; with `whole` also over a symbolic link, and a file with data that is not
    there: not every name comes through as it is.
    """
    if not os.path.isabs(base):
        raise LoggableError(f'its path {quoted(base)} is not absolute')
    found, multi = {}, torrent['is_multi_file'] and not os.path.islink(base)
    if not torrent['d_base_path'] and not torrent['done'] and os.path.lexists(base):
        raise LoggableError(f'{quoted(base)} may not be its own: rTorrent has not opened it')
    rows = without_errors(engine.ask([(
        'f.multicall', torrent['hash'], '', 'f.path=', 'f.size_bytes=', 'f.completed_chunks=')]))[0]
    for name, size, chunks in rows:
        path = os.path.join(base, name) if multi else base
        if os.path.islink(path) or os.path.isfile(path):
            found[path] = os.lstat(path).st_size
            if multi and not lies_in(os.path.realpath(os.path.dirname(path)),
                                     os.path.realpath(base)):
                raise LoggableError(f'{quoted(path)} leads out of {quoted(base)}')
        elif size and chunks and MANGLED.search(base + name):
            raise LoggableError(f'{quoted(path)} is not there by this name: its data would stay')
        wrong = 'is a link' if os.path.islink(path) else \
            'is not there' if size and chunks and path not in found else \
            'is not whole' if size and torrent['is_complete'] and found.get(path) != size else ''
        if wrong and whole:
            raise LoggableError(f'{quoted(path)} {wrong}')
    return list(found)


def freed_by(files: list[str]) -> int:
    """Return the bytes that deleting files frees: none of one with a hard link elsewhere."""
    stats = [os.lstat(path) for path in files]
    links = collections.Counter((stat.st_dev, stat.st_ino) for stat in stats)
    return sum(stat.st_blocks * 512 // stat.st_nlink for stat in stats
               if links[stat.st_dev, stat.st_ino] == stat.st_nlink)


def remove_files(files: Iterable[str], base: str) -> None:
    """Delete files, and the folders below and at `base` that are empty then."""
    failed = None
    for path in files:
        try:
            os.remove(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            failed = error
        with contextlib.suppress(OSError):              # not empty: something else is in it
            while path != base:
                path = os.path.dirname(path)
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(path)
    if failed:
        raise LoggableError(f'not all is deleted: {failed}')


class Action(Choice):
    """Do something with every torrent that meets a condition; deleting has guards."""
    options = (
        *Choice.options,
        Option('action', functools.partial(parse_word, DO), '', ' '.join(DO)),
        Option('args', str, '', 'template for tag untag throttle log, KEY=VALUE for custom, 0 to '
                                '3 for prio, commands of rTorrent for exec'),
        Option('limit', parse_count, '', 'most torrents in a run; left out, all, or 10 to delete'),
        Option('confirm', parse_count, '1', 'act on what met the condition so many runs in a row'),
        Option('until_free', parse_size, '0', 'cull one by one until this much is free; 0: all'),
        Option('shared', functools.partial(parse_word, ('keep', 'delete')), 'keep',
               'data that another item uses: keep or delete'))

    def __init__(self, config: JobConfig):
        super().__init__(config)
        action, args = config.action, config.args
        if action == 'custom':
            args = re.sub(r'\s*=\s*', '=', args, count=1)
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
        args = '' if (action, args) == ('throttle', 'none') else args
        self.deletes = action in ('delete', 'cull')
        self.fields = tuple(DO[action][0].split())
        self.template = self.use('args', CommandTemplate if action == 'exec' else Template, args)
        self.met: dict[str, int] = {}           # hash -> runs in a row that it met the condition
        self.gone: set[str] = set()             # a dry run of a cull would have erased these

    def run(self) -> None:
        """Act on what has met the condition often enough, as far as the guards allow."""
        config, self.gone = self.config, set()
        met, self.met = self.met, {}            # a listing that fails ends all runs in a row
        torrents = self.chosen()
        self.met = {torrent['hash']: met.get(torrent['hash'], 0) + 1 for torrent in torrents}
        # a single dry run shows what will be done once enough runs agree
        confirm = 1 if self.dry_run and config.alone else config.confirm
        if self.dry_run:
            self.LOG.info('dry run: %d torrents meet the condition', len(torrents))
        ready = self.hold_back(torrents, [
            torrent for torrent in torrents if self.met[torrent['hash']] >= confirm],
            f'it has not yet met the condition in {confirm} runs in a row')
        if self.deletes:                # 0.9.8 may hang, and what is done is not known
            ready = self.hold_back(ready, [torrent for torrent in ready
                                           if not torrent['is_hashing']], 'it is being checked')
        limit = 10 if self.deletes and config.limit is None else config.limit
        if config.until_free:
            ready = self.until_free(ready, limit)
        self.each(ready, self.perform, limit)

    def until_free(self, torrents: list[Torrent], limit: int) -> list[Torrent]:
        """Return those, in order, whose deletion makes enough free on their disk."""
        promised: dict = collections.defaultdict(int)
        chosen: list[Torrent] = []
        enough, useless = [], []
        used = places_in_use(self.engine) if torrents else []
        for at, torrent in enumerate(torrents):
            if len(chosen) == limit:
                self.hold_back(torrents[at:], [], f'the limit is {limit}')
                break
            device, free = disk_of(torrent['path'])
            try:
                if free is None or free + promised[device] >= self.config.until_free:
                    enough.append(torrent)
                elif freed := freed_by(self.own_files(torrent, used)):
                    promised[device] += freed
                    chosen.append(torrent)
                else:
                    useless.append(torrent)
            except Unreachable:
                raise
            except (LoggableError, OSError, ValueError) as error:
                self.LOG.warning('%s: %s', torrent, error)
        self.hold_back(enough, [], f'{show_size(self.config.until_free)} are free without it')
        self.hold_back(useless, [], 'deleting it frees nothing')
        return chosen

    def own_files(self, torrent: Torrent, used: list[tuple[str, str, str]]) -> list[str]:
        """Return the files to delete with an item: none that another item uses."""
        user = self.config.shared == 'keep' and used_by_other(
            used, {torrent['hash'], *self.gone}, torrent['path'])
        if user:
            self.LOG.info('the data of %s stays: another item uses %s', torrent, quoted(user))
            return []
        if os.path.islink(torrent['path']):
            raise LoggableError(f"{quoted(torrent['path'])} is a link: its data would stay")
        files = item_files(self.engine, torrent, torrent['path'])
        if not files and torrent['is_complete']:
            raise LoggableError(f"there is no data at {quoted(torrent['path'])}; the action delete "
                                'is for an item without')
        for folder in {os.path.dirname(file) for file in files}:
            if not os.access(folder, os.W_OK | os.X_OK):
                raise LoggableError(f'nothing can be deleted in {quoted(folder)}')
        return files

    def perform(self, torrent: Torrent) -> bool:
        """Do the action on one torrent; tell whether there was anything to do."""
        action = self.config.action
        shown = self.template.render(torrent)
        calls = [(method, torrent['hash'], *rest)
                 for method, *rest in DO[action][1](shown, torrent)]
        if action == 'exec':
            calls = [('branch', torrent['hash'], 'd.hash=', text)
                     for text in self.template.commands(torrent)]
        if not calls and action != 'log':
            self.LOG.debug('%s %s: nothing to do', action, torrent)
            return False
        if self.deletes and torrent['is_hashing']:      # since the run began
            raise LoggableError('it is being checked')
        files = self.own_files(torrent, places_in_use(self.engine)) if action == 'cull' else []
        if not self.announce(action, torrent, shown and quoted(shown), action == 'cull' and
                             f"with {len(files)} files at {quoted(torrent['path'])}"):
            self.gone.add(torrent['hash'])
            return True
        answers = self.engine.tell(calls) if calls else []
        for answer in answers[-1:] if self.deletes else answers:        # erased is erased
            if isinstance(answer, RpcError):
                raise answer
        if files:
            remove_files(files, torrent['path'])
        return True


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


def same_file(path: str, copy: str) -> bool:
    """Tell whether another path is a copy, or hard link; times may be rounded to 2 s."""
    try:
        one, other = os.lstat(path), os.lstat(copy)
    except OSError:
        return False
    return (one.st_mode >> 12, one.st_size) == (other.st_mode >> 12, other.st_size) and \
        abs(one.st_mtime - other.st_mtime) <= 2 and os.path.realpath(path) != os.path.realpath(copy)


def discard(path: str) -> None:
    """Delete a file, or a folder and all in it, if it is there."""
    import shutil
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.remove(path)


def copy_whole(files: list[str], source: str, copy: str) -> None:
    """Have a copy of data on the disk, as hard links where that is possible."""
    import shutil
    discard(copy)                       # what a crash left
    if os.path.lexists(copy):
        raise LoggableError(f'{quoted(copy)} cannot be deleted')
    for path in files:
        place = copy + path[len(source):]
        os.makedirs(os.path.dirname(place), exist_ok=True)
        try:
            os.link(path, place)
        except OSError:                 # another file system, or one without hard links
            shutil.copyfile(path, place)
            with contextlib.suppress(OSError):          # not every file system has modes
                shutil.copystat(path, place)
        if not same_file(path, place):
            raise LoggableError(f'{quoted(path)} changed while it was copied')
        sync(place)
    for folder, _, _ in os.walk(copy):
        sync(folder)


class Move(Choice):
    """Move the data of torrents that meet a condition, and tell rTorrent.

    The data becomes whole at the target first, as hard links or as copies, under a temporary
    name; then rTorrent is told; then the source is removed. After a crash at any moment the
    torrent points at whole data, and the next run goes on by the MARK, `SOURCE//TARGET`.
    """
    options = (
        *Choice.options,
        Option('target', str, '', 'folder to move to, a template; where it is empty, none'))
    MARK = 'torque_move'                # a custom value of rTorrent
    fields = ('path', 'is_multi_file', 'is_complete', 'is_hashing', 'is_open', 'done', 'd_state',
              'd_base_path', f'custom_{MARK}')

    def __init__(self, config: JobConfig):
        super().__init__(config)
        if not config.target:
            raise UserError('is not set', option='target')
        self.template = self.use('target', Template, config.target)
        self.closed = parse_condition(f'custom_{self.MARK}=?* d_state=1 is_open=no is_hashing=no')

    def run(self) -> None:
        """Move what meets the condition, beside no other Move of this state_dir."""
        import fcntl
        path = os.path.join(self.config.state_dir, 'move.lock')
        with writing(path):
            lock = open_private(path)
        with lock:
            try:                                # against other Moves and --run-once, too
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LoggableError('another Move is at work') from None
            chosen = self.chosen()
            self.reopen({torrent['hash'] for torrent in chosen})
            self.each(chosen, self.move)

    def reopen(self, chosen: set[str]) -> None:
        """Start again what an earlier process has closed to move it, and is not met any more.

        Not the others: 0.9.8 aborts over more than 10 tracker requests of an item in 10 s.
        """
        for torrent in list_torrents(self.engine, 'default', Move.fields, self.closed):
            if torrent['hash'] not in chosen and self.announce(
                    'starting again, for its move was cut short:', torrent):
                self.start_again(torrent)

    def move(self, torrent: Torrent) -> None:
        """Move one item, unless anything about it is doubtful."""
        folder = os.path.expanduser(self.template.render(torrent))
        source, mark = torrent['path'], torrent[f'custom_{self.MARK}']
        if not folder:
            return
        if not os.path.isabs(folder) or '..' in folder.split('/') or '\0' in folder:
            raise LoggableError(f'target {quoted(folder)} is no absolute path')
        folder = os.path.normpath(folder)
        target = os.path.join(folder, os.path.basename(source))
        if os.path.isabs(source) and os.path.realpath(source) == os.path.realpath(target):
            if mark.endswith(f'//{target}'):
                old = mark[:-len(target) - 2]
                if self.announce('removing what was moved:', torrent, 'at', quoted(old)):
                    self.finish(torrent, old, target)
            return
        files = item_files(self.engine, torrent, source, whole=True)
        user = used_by_other(places_in_use(self.engine), [torrent['hash']], source, target)
        again = mark == f'{source}//{target}' and all(
            same_file(path, target + path[len(source):]) for path in files)
        for wrong, why in (
                (not files, f'there is no data at {quoted(source)}'),
                (user, f'another item uses {quoted(user)}'),
                (torrent['is_hashing'], 'it is being checked'),
                (lies_in(os.path.realpath(folder), os.path.realpath(source)),
                 f'{quoted(folder)} lies in it'),
                (os.path.lexists(target) and not again,
                 f'{quoted(target)} exists: nothing is overwritten')):
            if wrong:
                raise LoggableError(f'not moved: {why}')
        if self.announce('moving', torrent, 'from', quoted(source), 'to', quoted(folder)):
            self.carry_out(torrent, files, target)

    def carry_out(self, torrent: Torrent, files: list[str], target: str) -> None:
        """Close an item, bring its data to the target, tell rTorrent, open and start it again."""
        proxy, item, folder = self.engine.open(), torrent['hash'], os.path.dirname(target)
        copy = os.path.join(folder, f'.torque-{item}')
        old, new = proxy.d.directory_base(item), target if torrent['is_multi_file'] else folder
        proxy.d.custom.set(item, self.MARK, f"{torrent['path']}//{target}")
        proxy.d.close(item)             # d.state stays: a crash does not make it forget
        try:
            if not os.path.lexists(target):
                copy_whole(files, torrent['path'], copy)
                if proxy.d.is_open(item):
                    raise LoggableError('it was opened while its data was copied')
                if os.path.lexists(target):
                    raise LoggableError(f'{quoted(target)} exists: nothing is overwritten')
                os.rename(copy, target)
                sync(folder)
            proxy.d.directory_base.set(item, new)
            if proxy.d.directory_base(item) != new:
                raise LoggableError(f'rTorrent took {quoted(new)} for something else')
            self.open_data(item, len(files), target)            # only this renews d.base_path
            proxy.d.save_full_session(item)
        except BaseException:
            discard(copy)
            proxy.d.close(item)
            proxy.d.directory_base.set(item, old)
            self.start_again(torrent)
            if not os.path.lexists(target):
                proxy.d.custom.set(item, self.MARK, '')
            raise
        self.finish(torrent, torrent['path'], target)

    def open_data(self, item: str, count: int, target: str) -> None:
        """Have rTorrent open an item; LoggableError where it does not find so many files."""
        proxy = self.engine.open()
        proxy.d.open(item)
        if sum(row[0] for row in proxy.f.multicall(item, '', 'f.is_created=')) < count:
            raise LoggableError(f'rTorrent cannot open the data at {quoted(target)}: it stays at '
                                'the old place, too')

    def start_again(self, torrent: Torrent) -> None:
        """Bring an item to the state that it had."""
        names = ('d.stop', 'd.start') if torrent['d_state'] else \
            () if torrent['is_open'] else ('d.close',)
        for answer in self.engine.tell([                # at once: a crash between would stop it
                (name, torrent['hash']) for name in ('d.open', *names)]):
            if isinstance(answer, RpcError):
                raise answer

    def finish(self, torrent: Torrent, source: str, target: str) -> None:
        """Remove those files of an item at its old place that are at the new one, too."""
        try:
            if used_by_other(places_in_use(self.engine), [torrent['hash']], source):
                raise LoggableError(f'{quoted(source)} stays, too: another item uses it')
            files = item_files(self.engine, torrent, target)
            self.open_data(torrent['hash'], len(files), target)
            places = [(path, source + path[len(target):]) for path in files]
            remove_files([old for path, old in places
                          if same_file(path, old) or not os.path.lexists(old)], source)
        finally:
            self.start_again(torrent)
        self.engine.open().d.custom.set(torrent['hash'], self.MARK, '')
        self.engine.open().d.save_full_session(torrent['hash'])


BENCODED = re.compile(rb'i(0|-?[1-9][0-9]{0,18})e|(0|[1-9][0-9]{0,9}):')


def bdecode(content: bytes) -> tuple[Any, bytes]:
    """Return the value of bencoded bytes, and the bytes of its `info`, of which comes the hash.

    Raises ValueError for anything else. Text stays bytes; what follows the value is ignored,
    as rTorrent ignores it.

    >>> bdecode(b'd4:infod4:name1:aee')
    ({b'info': {b'name': b'a'}}, b'd4:name1:ae')
    """
    info = b''

    def value(at: int, depth: int) -> tuple[Any, int]:
        """Return the value that begins there, and where it ends."""
        nonlocal info
        token = BENCODED.match(content, at)
        if token:
            end = token.end() + int(token[2] or 0)
            if end <= len(content):
                return int(token[1]) if token[1] else content[token.end():end], end
        elif content[at:at + 1] in (b'l', b'd') and depth < 50:
            items: list = []
            is_list, at = content[at:at + 1] == b'l', at + 1
            while content[at:at + 1] != b'e':
                item, end = value(at, depth + 1)
                if depth == 0 and len(items) % 2 and items[-1] == b'info':
                    info = content[at:end]
                items.append(item)
                at = end
            if is_list:
                return items, at + 1
            if len(items) % 2 == 0 and all(isinstance(key, bytes) for key in items[::2]):
                return dict(zip(items[::2], items[1::2])), at + 1
        raise ValueError(f'not bencoded at byte {at}')

    return value(0, 0)[0], info


METAFILE_LIMIT = 64 << 20               # bytes


class Metafile(NamedTuple):
    """What a .torrent file says."""
    content: bytes
    info_hash: str
    name: str                           # bytes that are no UTF-8 are surrogates in it
    tracker: str
    main_file: str                      # name of the largest file


def read_metafile(path: str) -> Metafile:
    """Return a metafile; raises ValueError when it is none, or not whole."""
    import hashlib
    import stat
    if not stat.S_ISREG(os.stat(path).st_mode):         # a named pipe would block for ever
        raise ValueError('no regular file')
    with open(path, 'rb') as stream:
        content = stream.read(METAFILE_LIMIT + 1)
    if not content or len(content) > METAFILE_LIMIT:
        raise ValueError(f'larger than {show_size(METAFILE_LIMIT)}' if content else 'empty')
    meta, info_bytes = bdecode(content)
    info = meta.get(b'info') if isinstance(meta, dict) else None
    if not isinstance(info, dict):
        raise ValueError('no `info` in it')
    name, files, pieces = info.get(b'name'), info.get(b'files'), info.get(b'pieces')
    if not isinstance(name, bytes) or name in (b'', b'.', b'..') or re.search(rb'[/\0]', name):
        raise ValueError('no usable `name` in it')
    if not isinstance(pieces, bytes) or not pieces or len(pieces) % 20 or not (
            isinstance(files, list) or isinstance(info.get(b'length'), int)):
        raise ValueError('no pieces, or no length in it')
    if list(info) != sorted(info):
        raise ValueError('the keys of `info` are not in order')
    largest = name
    with contextlib.suppress(KeyError, TypeError, IndexError, ValueError):
        largest = max(files or [], key=lambda entry: entry[b'length'])[b'path'][-1]
    return Metafile(content, hashlib.sha1(info_bytes).hexdigest().upper(), *(
        text.decode('utf-8', 'surrogateescape') if isinstance(text, bytes) else ''
        for text in (name, meta.get(b'announce'), largest)))


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

    def send(self, proxy: Any, path: str, meta: Metafile, start: bool, texts: list) -> None:
        """Load by path where rTorrent sees the file, else by content; wait for the item."""
        patience = 1 + len(meta.content) / 5e6
        pattern = re.search(r'[*?[]', path)        # rTorrent would look for others
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
    def appears(proxy: Any, item: str, seconds: float) -> bool:
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
    Option('log_level', parse_level, '', 'DEBUG, INFO, WARNING or ERROR'),
    Option('max_runtime', parse_duration, '', 'a run is called overdue after this time'),
    Option('catch_up', parse_bool, 'no', 'make up at the start for a run missed before'),
    Option('ping_url', parse_ping_url, '', 'monitor that is told of runs: /start, /fail, '
                                         'or nothing added'))
TORQUE_OPTIONS = (                      # what [TORQUE] has beside jobs
    Option('scgi_url', str, '', 'where rTorrent answers; left out, rtorrent_rc tells'),
    Option('rtorrent_rc', str, '', "rTorrent's configuration"),
    Option('rpc_timeout', parse_duration, '30s', 'most time for one call to rTorrent'),
    Option('rpc_limit', parse_size, '64m', 'largest answer of rTorrent that is read'),
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
                planned.config.engine = self.find_engine(entries, f'job.{name}.', ini) \
                    if planned.config.scgi_url else self.engine
                planned.config.state_dir, planned.config.alone = self.state_dir, bool(only)
                self.jobs.append(planned)
        if ini.mistakes:
            raise Mistakes(ini.mistakes)

    def find_engine(self, entries: dict[str, Entry], prefix: str, ini: Ini) -> Any:
        """Return the Engine for scgi_url; without one for what rTorrent's own rc says."""
        entry, key = entries.get('scgi_url'), prefix + 'scgi_url'
        url = entry.value if entry else ''
        try:
            if not url and ini.mistakes:        # it may be among what was not understood
                return None
            if not url:
                url, key = find_url(self.torque.rtorrent_rc), 'rtorrent_rc'
            made_of = (url, self.torque.rpc_timeout or RPC_TIMEOUT,
                       self.torque.rpc_limit or RPC_LIMIT)
            if made_of not in self.engines:
                engine = self.former.get(made_of)
                if not engine:
                    engine = Engine(*made_of, self.aliases)
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
    return re.sub(r'(\w://[^\s:/@]*):\S*@', r'\1:***@', text)


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
            engine.reach()
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
