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
    Jobs                Job, and the built-in ones
    Config              torque.ini -> Config -> jobs
    Command line        signals, log, main

Exit status: 0 fine, 1 a job failed (--run-once), 2 usage, 78 configuration.
"""
from __future__ import annotations

import sys

if __name__ == '__main__':              # nothing beside this file may shadow a library
    sys.path.append(sys.path.pop(0))

import binascii
import bisect
import collections
import contextlib
import functools
import heapq
import itertools
import json
import logging
import os
import queue
import random
import re
import shlex
import socket
import threading
import time
from datetime import date, datetime, timedelta
from typing import Any, Callable, Iterable, NamedTuple

# Imported where they are first needed, because they cost most of the start-up time:
# argparse, configparser, gzip, importlib, urllib.request, xmlrpc.client (brings ssl), zoneinfo.

VERSION = '1.0'
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CONFIG = 0, 1, 2, 78


# --- Errors ----------------------------------------------------------------------------------
# Every error that a user can cause or cure is a LoggableError: it is shown as one line, never
# as a traceback. The layer that finds it names the value; the layers above add the place.

class LoggableError(Exception):
    """Something went wrong that one line explains; `told` when the log has that line already."""
    told = False
    pause: float | None = None          # seconds that the other side asks to wait


class UserError(LoggableError):
    """The configuration or the command line is wrong: nothing but its author can mend it."""


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
SIZE_UNITS = {'': 1, 'b': 1, 'k': 1 << 10, 'm': 1 << 20, 'g': 1 << 30, 't': 1 << 40}


def parse_bool(text: Any) -> bool:
    """Return the truth that a word stands for.

    >>> parse_bool('Yes'), parse_bool('off')
    (True, False)
    """
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
    units = [unit for _, unit in words]
    if (not re.fullmatch(rf'\s*(?:{part})+', str(text).lower()) or len(set(units)) < len(units)
            or '' in units and len(units) > 1):
        raise UserError(f'{text!r} is not a length of time; allowed are e.g. 15s 5m 1h30m 2d')
    return sum(float(number) * DURATION_UNITS[unit or 's'] for number, unit in words)


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
    """Return a whole number, zero or more.

    >>> parse_count('10')
    10
    """
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
        if left >= size:
            parts.append(f'{left // size}{unit}')
            left %= size
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
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f'; did you mean {close[0]!r}?' if close else ''


# --- Schedule --------------------------------------------------------------------------------
# Text enters, a Schedule leaves; its next(after) maps Unix seconds to the first due time after
# them. Nothing here looks at a clock. An Interval counts elapsed seconds from a start. A
# Calendar matches wall time: `wall` is a naive datetime as a clock on the wall shows it, and
# a clock change is where the distance between wall and Unix seconds (the offset) jumps.

WEEKDAYS = ('mon', 'tue', 'wed', 'thu', 'fri', 'sat', 'sun')
MONTHS = ('jan', 'feb', 'mar', 'apr', 'may', 'jun', 'jul', 'aug', 'sep', 'oct', 'nov', 'dec')
POSITIONS = ('1st', '2nd', '3rd', '4th', '5th', 'last')
SECOND = timedelta(seconds=1)


class Field(NamedTuple):
    """One part of a calendar schedule: its range, its names, and the value of names[0]."""
    name: str
    low: int
    high: int
    names: tuple = ()
    base: int = 0


FIELDS = {field.name: field for field in (
    Field('year', 1970, 9999), Field('month', 1, 12, MONTHS, 1), Field('day', 1, 31),
    Field('week', 1, 53), Field('day_of_week', 0, 6, WEEKDAYS), Field('hour', 0, 23),
    Field('minute', 0, 59), Field('second', 0, 59))}
CRON_WEEKDAY = Field('day of week', 0, 7, WEEKDAYS[6:] + WEEKDAYS[:6])
CRON_FIELDS = ('minute', 'hour', 'day', 'month', 'day_of_week')
CRON_NAMES = {'@hourly': '0 * * * *', '@daily': '0 0 * * *', '@midnight': '0 0 * * *',
              '@weekly': '0 0 * * 0', '@monthly': '0 0 1 * *', '@yearly': '0 0 1 1 *',
              '@annually': '0 0 1 1 *'}


def parse_field(text: str, field: Field) -> frozenset:
    """Return the numbers that a field allows; a day may be a position too, as ('3rd', 6).

    part ::= ('*' | value | value '-' value) ['/' step] | 'last' | position weekday
    field ::= part (',' part)*

    >>> sorted(parse_field('0-20/10,30', FIELDS['minute']))
    [0, 10, 20, 30]
    """
    allowed: set = set()
    for part in text.lower().split(','):
        position, _, weekday = part.strip().partition(' ')
        if field.name == 'day' and position in POSITIONS and (weekday or position == 'last'):
            allowed.add((position, weekday and field_value(weekday.strip(),
                                                           FIELDS['day_of_week'])))
            continue
        match = re.fullmatch(r'\s*(?:(\*)|(\w+)(?:-(\w+))?)(?:/(\d+))?\s*', part)
        if not match:
            raise UserError(f'{field.name} {part!r} is not understood; '
                            'allowed are * */n a a-b a-b/n and lists of these')
        star, first, last, step = match.groups()
        low = field.low if star else field_value(first, field)
        top = field.high
        if field is CRON_WEEKDAY and not last:
            low, top = low % 7, 6                       # 7 is Sunday once more
        high = field_value(last, field) if last else top if star or step else low
        if last == 'sun' and field is CRON_WEEKDAY and high < low:
            high = 7                                    # sat-sun
        if low > high:
            raise UserError(f'{field.name} {part!r} is an empty range; '
                            f'write {first}-{field.high},{field.low}-{last} to go round')
        if step and not 0 < int(step) <= field.high - field.low:
            raise UserError(f'{field.name} {part!r} has a step that is '
                            f'not in 1-{field.high - field.low}')
        allowed.update(range(low, high + 1, int(step or 1)))
    return frozenset(allowed)


def field_value(word: str, field: Field) -> int:
    """Return the number that a word means in a field: digits, or a name such as `mon`."""
    if word in field.names:
        return field.names.index(word) + field.base
    if not re.fullmatch('[0-9]{1,4}', word) or not field.low <= int(word) <= field.high:
        also = f' or {field.names[0]} ... {field.names[-1]}' if field.names else ''
        raise UserError(f'{field.name} {word!r} is not in {field.low}-{field.high}{also}')
    return int(word)


class Schedule:
    """When a job is due. `jitter` is the most seconds a run may be put off, at random."""
    jitter = 0.0
    elapsed = False                     # True: next() takes and gives elapsed, not Unix seconds
    step_back = 60                      # clock set back by less: no due time comes twice

    def next(self, after: float) -> float | None:
        """Return the first due time after `after`, None when there is none any more."""
        raise NotImplementedError


class Interval(Schedule):
    """Every so many seconds, counted from `start` without drift.

    >>> Interval(15).next(31)
    45
    """
    elapsed = True

    def __init__(self, seconds: float, start: float = 0):
        self.seconds = seconds
        self.start = start

    def next(self, after: float) -> float:
        due = self.start + ((after - self.start) // self.seconds + 1) * self.seconds
        return due if due > after else due + self.seconds      # the division may round down


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
            if name in texts:
                allowed[name] = parse_field(
                    texts[name], CRON_WEEKDAY if cron and name == 'day_of_week' else field)
            else:
                every = index < finest or name in ('week', 'day_of_week')
                allowed[name] = range(field.low, field.high + 1) if every else {field.low}
        self.years, self.first_year = allowed['year'], min(allowed['year'])
        self.months, self.weeks = sorted(allowed['month']), allowed['week']
        self.monthdays, self.weekdays = allowed['day'], allowed['day_of_week']
        self.positions = [day for day in self.monthdays if isinstance(day, tuple)]
        if cron:
            self.weekdays = {(number + 6) % 7 for number in self.weekdays}
        self.either = cron and not (                    # as croniter decides
            '*' in texts['day'].split(',') + texts['day_of_week'].split(',')
            or len(self.monthdays) == 31 and '*' in texts['day_of_week']
            or len(self.weekdays) == 7 and '*' in texts['day'])
        self.hours, self.minutes, self.seconds = (
            self.successors(allowed[name], FIELDS[name].high) for name in
            ('hour', 'minute', 'second'))
        self.days = functools.lru_cache(64)(self.matching_days)
        self.keep_time(len(allowed['hour']) == 24, zone)

    def keep_time(self, every_hour: bool, zone: Any) -> None:
        """Set what a clock change does."""
        self.zone, self.every_hour = zone, every_hour
        self.step_back = 60 if every_hour else 3 * 3600

    @staticmethod
    def successors(allowed: Iterable, high: int) -> list:
        """Return a table: at [n] the smallest allowed number that is n or more, else None."""
        table: list = [None] * (high + 2)
        for number in range(high, -1, -1):
            table[number] = number if number in allowed else table[number + 1]
        return table

    def matching_days(self, year: int, month: int) -> list[int]:
        """Return the days of one month that are allowed, in order."""
        if year not in self.years or month not in self.months:
            return []
        first = date(year, month, 1)
        length = 31 if month == 12 else (date(year, month + 1, 1) - first).days
        week, last_week = (date(year, month, day).isocalendar()[1] for day in (1, length))
        if week <= last_week and not any(n in self.weeks for n in range(week, last_week + 1)):
            return []
        found = []
        for day in range(1, length + 1):
            weekday = (first.weekday() + day - 1) % 7
            if weekday == 0:
                week = date(year, month, day).isocalendar()[1]
            by_day, by_weekday = day in self.monthdays, weekday in self.weekdays
            if not by_day and self.positions:
                names = {POSITIONS[(day - 1) // 7], 'last' if day + 7 > length else ''}
                by_day = any(position in names and on == weekday if on != '' else day == length
                             for position, on in self.positions)
            if week in self.weeks and (by_day or by_weekday if self.either else
                                       by_day and by_weekday):
                found.append(day)
        return found

    def wall_from(self, wall: datetime) -> datetime | None:
        """Return the first allowed wall time that is `wall` or later."""
        year, month, day = wall.year, wall.month, wall.day
        days = self.days(year, month)
        if day in days:
            hour, minute, second = wall.hour, wall.minute, self.seconds[wall.second]
            if second is None:
                minute, second = minute + 1, self.seconds[0]
            if self.minutes[minute] != minute:
                minute, second = self.minutes[minute], self.seconds[0]
            if minute is None:
                hour, minute = hour + 1, self.minutes[0]
            if self.hours[hour] != hour:
                hour, minute, second = self.hours[hour], self.minutes[0], self.seconds[0]
            if hour is not None:
                return datetime(year, month, day, hour, minute, second)
        index = bisect.bisect(days, day)
        last = min(max(year, self.first_year) + 400, 9999)      # the calendar repeats by then
        while index >= len(days):
            later = bisect.bisect(self.months, month)
            year, month = (year, self.months[later]) if later < len(self.months) else (
                year + 1, self.months[0])
            if year > last:
                return None
            days, index = self.days(year, month), 0
        return datetime(year, month, days[index], self.hours[0], self.minutes[0], self.seconds[0])

    def wall(self, seconds: float) -> datetime:
        """Return the naive wall time at Unix seconds; its `fold` is 1 when it comes again."""
        wall = datetime.fromtimestamp(seconds, self.zone)
        return wall.replace(tzinfo=None) if self.zone else wall

    def unix(self, wall: datetime) -> int:
        """Return the Unix seconds of a naive wall time; `fold` 1 means its second coming."""
        return int(wall.replace(tzinfo=self.zone).timestamp())

    def change(self, low: int, high: int) -> int:
        """Return the first second after `low` that has the offset of `high`."""
        def offset(seconds: int) -> int:
            wall = self.wall(seconds)
            return (wall - datetime(1970, 1, 1)) // SECOND - seconds
        after = offset(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if offset(middle) == after else (middle, high)
        return high

    def next(self, after: float) -> float | None:
        start = int(after // 1) + 1
        try:
            return self.by_real_time(start) if self.every_hour else self.by_wall(start)
        except (OverflowError, ValueError):         # beyond the year 9999
            return None

    def by_real_time(self, start: int) -> int | None:
        """Return the first second from `start` on whose wall time is allowed."""
        while True:
            wall = self.wall(start)
            found = self.wall_from(wall)
            if found is None:
                return None
            ahead = (found - wall) // SECOND
            end = start + min(ahead, 86400)         # no two changes lie within a day
            if self.wall(end) - wall != (end - start) * SECOND:
                start = self.change(start, end)
            elif end == start + ahead:
                return end
            else:
                start = max(end, self.unix(found - timedelta(1)))

    def by_wall(self, start: int) -> int | None:
        """Return the first second from `start` on that is allowed and not a repetition."""
        wall = self.wall(start - 1)                 # `start` may be right after a gap
        if wall.fold:                               # go to where the repetition ends
            change = self.change(self.unix(wall.replace(fold=0)), start - 1)
            wall = max(wall.replace(fold=0), self.wall(change - 1))
        found = self.wall_from(wall + SECOND)
        if found is None:
            return None
        seconds = self.unix(found)
        if self.wall(seconds) == found:
            return seconds
        return self.change(self.unix(found.replace(fold=1)), seconds)       # skipped


class Croniter(Calendar):
    """A cron expression beyond torque's grammar, as the croniter package reads it."""

    def __init__(self, text: str, zone: Any = None):
        import croniter                             # type: ignore
        self.text, self.croniter = text, croniter.croniter
        self.keep_time(text.split()[1] == '*', zone)
        try:
            self.croniter(text, datetime(2000, 1, 1))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f'croniter refuses {text!r}: {error}') from None

    def wall_from(self, wall: datetime) -> datetime | None:
        try:
            return self.croniter(self.text, wall - SECOND).get_next(datetime)
        except ValueError:                          # CroniterBadDateError: no such date
            return None


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


def parse_plain(words: list[str], zone: Any) -> Schedule:
    """Return the Schedule of an interval or a cron expression, split into words."""
    text = ' '.join(words)
    if words[0].lower() == 'every' or len(words) == 1 and text.lower() not in CRON_NAMES:
        seconds = parse_duration(re.sub(r'(?i)^every\s*', '', text))
        if seconds < 0.1:
            raise UserError(f'interval {text!r} is too short; at least 0.1s is allowed')
        return Interval(seconds)
    text = CRON_NAMES.get(text.lower(), text)
    words = text.split()
    names = '|'.join(WEEKDAYS + MONTHS)
    if len(words) in (6, 7) or len(words) == 5 and re.search(
            '[lw#?]', re.sub(names, '', text.lower())):
        try:
            return Croniter(text, zone)
        except ImportError:
            raise UserError(f'{text!r} needs croniter, which is not installed; without it cron '
                            'has five fields of * */n a a-b a-b/n and names') from None
    if len(words) != 5:
        raise UserError(f'{text!r} has {len(words)} words; cron has five fields: '
                        'minute hour day month weekday')
    return Calendar({**dict(zip(CRON_FIELDS, words)), 'second': '0'}, zone, cron=True)

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
    clock = getattr(time, 'CLOCK_BOOTTIME', None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


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


class Task:
    """One job as the scheduler sees it, and how it has gone so far.

    due is in the clock of the schedule; last_start and running_since are Unix seconds.
    """

    def __init__(self, name: str, schedule: Schedule, run: Callable[[], Any],
                 max_runtime: float | None = None, log: Any = None):
        self.name, self.schedule, self.run, self.max_runtime = name, schedule, run, max_runtime
        self.log = log or logging.getLogger('torque.' + name)
        self.due: float | None = None
        self.last_due: float | None = None
        self.runs = self.failures = self.missed = self.waiting = 0
        self.last_start: float | None = None
        self.last_duration: float | None = None
        self.last_error: str | None = None
        self.running_since: float | None = None
        self.overdue = self.removed = False
        self.failing: tuple | None = None       # (elapsed seconds, failures) when it began
        self.repeats = Repeats()

    def failed(self, error: BaseException, now: float) -> None:
        """Count a failure and log it: in full once, then summed up."""
        self.failures += 1
        self.last_error = f'{error}' if isinstance(error, LoggableError) else \
            f'{type(error).__name__}: {error}'
        since, said, before = self.failing or (now, False, self.failures - 1)
        row = self.repeats.seen(re.sub(r'[\d.]+', '#', self.last_error), now)
        told = getattr(error, 'told', False)
        self.failing = since, said or (row is not None and not told), before
        if row is None or told:
            self.log.debug('failed again: %s', self.last_error)
            return
        prefix = f'still failing, {row[0]} times in {show_duration(row[1])}: ' if row[0] else ''
        if isinstance(error, LoggableError):
            self.log.warning('%s%s', prefix, error,
                             exc_info=error if self.log.isEnabledFor(TRACE) else None)
        else:
            self.log.error('%s%s', prefix, self.last_error, exc_info=None if prefix else error)

    def worked(self, now: float) -> None:
        """Note that a run went well, and say so when the last failure was said."""
        self.last_error = None
        if self.failing:
            since, said, before = self.failing
            if said:
                self.log.info('works again, after %d failures in %s',
                              self.failures - before, show_duration(now - since))
            self.failing = None
            self.repeats.recovered()


class Scheduler:
    """Starts tasks when they are due, each run in a worker thread to itself."""

    def __init__(self, wall: Callable[[], float] = time.time,
                 elapsed: Callable[[], float] = elapsed_time):
        self.wall, self.elapsed = wall, elapsed
        self.offset = wall() - elapsed()
        self.tasks: dict[str, Task] = {}
        self.wall_heap: list = []               # (when, sequence, function of now)
        self.elapsed_heap: list = []
        self.sequence = itertools.count()
        self.lock = threading.Lock()            # guards running_since, waiting, spare, workers
        self.work: queue.SimpleQueue = queue.SimpleQueue()
        self.mail: queue.SimpleQueue = queue.SimpleQueue()      # signal handlers may put here
        self.spare = self.workers = 0           # spare: idle workers less waiting runs
        self.patience = PATIENCE
        self.stopping = False
        self.repeats = Repeats()
        self.log = logging.getLogger('torque.scheduler')

    def add(self, task: Task) -> Task:
        """Register a task; an interval is due now, a calendar at its next date."""
        self.tasks[task.name] = task
        if isinstance(task.schedule, Interval):
            task.schedule.start = task.due = self.elapsed()
        else:
            task.due = task.schedule.next(self.wall())
        self.push(task)
        return task

    def remove(self, name: str) -> Task:
        """Take a task out; a run in progress goes on."""
        task = self.tasks.pop(name)
        task.removed = True
        return task

    def push(self, task: Task) -> None:
        """Enter the task's due time into the heap of its clock."""
        if task.due is not None:
            heap = self.elapsed_heap if task.schedule.elapsed else self.wall_heap
            delay = random.uniform(0, task.schedule.jitter) if task.schedule.jitter else 0
            heapq.heappush(heap, (task.due + delay, next(self.sequence),
                                  functools.partial(self.come_due, task, delay)))

    def next_run(self, task: Task) -> float | None:
        """Return the Unix seconds of a task's next due time."""
        if task.due is None or not task.schedule.elapsed:
            return task.due
        return self.wall() + task.due - self.elapsed()

    # What follows up to tick() is the pure part.

    def come_due(self, task: Task, delay: float, now: float) -> list[Task]:
        """Move a task to its next due time; return it when a run is to start."""
        if task.removed:
            return []
        task.last_due, missed = task.due, 0
        due = task.schedule.next(now if task.due is None else task.due)
        while due is not None and due <= now - delay and missed < MOST_MISSED:
            task.last_due, missed = due, missed + 1
            due = task.schedule.next(due)
        if due is not None and due <= now - delay:
            due = task.schedule.next(now)
        task.due = due
        self.push(task)
        with self.lock:
            if task.running_since is not None:
                task.waiting += 1 + missed
                return []
            task.running_since = self.wall()
        if missed:
            task.missed += missed
            self.say_merged(task, f'{missed + 1} runs came due while the machine or torque '
                            'was held up', now)
        return [task]

    def say_merged(self, task: Task, text: str, now: float) -> None:
        """Log that due times were merged into one run, without flooding."""
        row = task.repeats.seen(re.sub(r'\d+', '#', text), now)
        if row is not None:
            again = f' ({row[0]} times in {show_duration(row[1])})' if row[0] else ''
            task.log.info('%s, merged into one%s', text, again)

    def set_back(self, step: float, wall: float) -> None:
        """Compute due times anew after the clock was set back by `step` seconds."""
        self.log.info('the clock was set back by %s', show_duration(step))
        self.wall_heap.clear()
        for task in self.tasks.values():
            if not task.schedule.elapsed:
                after = wall
                if task.last_due is not None and step < task.schedule.step_back:
                    after = max(wall, task.last_due)
                task.due = task.schedule.next(after)
                self.push(task)

    def tick(self, wall: float, elapsed: float) -> tuple[list[Task], float]:
        """Return the tasks that are to start now, and the seconds until the next look."""
        step = self.offset - (wall - elapsed)
        self.offset = wall - elapsed
        if step > 0.5:
            self.set_back(step, wall)
        ready: list[Task] = []
        sleep: float = MAX_SLEEP
        for heap, now in ((self.wall_heap, wall), (self.elapsed_heap, elapsed)):
            while heap and heap[0][0] <= now:
                ready += heapq.heappop(heap)[2](now)
            if heap:
                sleep = min(sleep, heap[0][0] - now)
        return ready, sleep

    # From here on there are threads.

    def start(self, task: Task) -> None:
        """Hand a run to the workers; running_since is set already."""
        with self.lock:
            self.spare -= 1
        if task.max_runtime:
            heapq.heappush(self.elapsed_heap, (
                self.elapsed() + task.max_runtime, next(self.sequence),
                functools.partial(self.check_overdue, task, task.runs)))
        self.work.put(task)

    def check_overdue(self, task: Task, run: int, now: float) -> list[Task]:
        """Mark a run that goes on for longer than max_runtime."""
        if task.running_since is not None and task.runs == run:
            task.overdue = True
            task.log.warning('still running after %s, its max_runtime',
                             show_duration(task.max_runtime or 0))
        return []

    def add_workers(self, most: int) -> None:
        """Start threads for runs that wait for one."""
        for _ in range(most):
            with self.lock:
                if self.spare >= 0:
                    return
                self.spare += 1
                self.workers += 1
            try:
                threading.Thread(target=self.worker, daemon=True).start()
            except RuntimeError as error:               # no more threads: try again later
                with self.lock:
                    self.spare -= 1
                    self.workers -= 1
                self.patience = 1.0
                if self.repeats.seen('threads', self.elapsed()):
                    self.log.error('no new worker thread: %s; %d are there', error, self.workers)
                return
            self.patience = PATIENCE

    def worker(self) -> None:
        """Run tasks until there are more than enough idle workers."""
        while True:
            self.run_task(self.work.get())
            with self.lock:
                if self.spare >= SPARE_WORKERS:
                    self.workers -= 1
                    return
                self.spare += 1

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
        if again:
            task.missed += waited - 1
            if waited > 1:
                self.say_merged(task, f'{waited} runs came due during the last one', ended)
            self.mail.put(functools.partial(self.start, task))
        elif self.stopping or task.removed:
            self.mail.put(None)

    def running(self) -> list[Task]:
        """Return the tasks that are running now."""
        return [task for task in self.tasks.values() if task.running_since is not None]

    def serve(self) -> None:
        """Run tasks until stop() is called; functions put into `mail` are called here."""
        while not self.stopping:
            ready, sleep = self.tick(self.wall(), self.elapsed())
            for task in ready:
                self.start(task)
            if self.spare < 0:
                if not self.workers and self.patience == PATIENCE:
                    self.add_workers(1)
                sleep = min(sleep, self.patience)
            before = self.work.qsize()
            try:
                message = self.mail.get(timeout=max(sleep, 0))
            except queue.Empty:
                if self.spare < 0:              # nothing taken meanwhile: they are all stuck
                    self.add_workers(10 if self.work.qsize() >= before else 1)
            else:
                if message is not None:
                    message()

    def stop(self) -> None:
        """Let serve() return; no new runs start."""
        self.stopping = True

    def finish(self, grace: float) -> list[Task]:
        """Wait up to `grace` seconds for runs in progress; return those that still run."""
        end = self.elapsed() + grace
        with contextlib.suppress(queue.Empty):
            while True:                         # what has not begun does not begin any more
                self.work.get_nowait().running_since = None
        while self.running() and self.elapsed() < end:
            try:
                message = self.mail.get(timeout=max(end - self.elapsed(), 0))
            except queue.Empty:
                break
            if message == self.stop:            # a second signal: no more waiting
                break
            if isinstance(message, functools.partial):      # start(task): not any more
                message.args[0].running_since = None
        return self.running()


# --- RPC -------------------------------------------------------------------------------------
# A URL becomes an Address; a request body goes to it within a deadline and the body of the
# answer comes back, over SCGI (one netstring of headers, one request per connection) or HTTP.
# XML-RPC and JSON-RPC texts are made and read here. A Proxy puts it together:
# proxy.d.name(HASH). "where" is an address as it may be shown: never with a password.

NOHASH = ''                             # the target of commands that belong to no item
RPC_TIMEOUT = 30.0                      # seconds for a whole call
RPC_LIMIT = 256 << 20                   # bytes of one answer
MISSING = (-506, -32601)                # codes of faults: there is no such command
BATCH = 500                             # calls in one request; rTorrent takes 512 KiB at most
HEAD_LIMIT = 8192                       # bytes before the body of an SCGI answer


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
        return self.kind == 'unix' or self.host in ('localhost', '::1') or \
            self.host.startswith('127.')


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
    if url.scheme in ('http', 'https') and host:
        clean = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path or '/RPC2'}"
        return Address('http', clean, clean, host, port, url.username and unquote(url.username),
                       url.password and unquote(url.password))
    path = spelt.partition('://')[2] or spelt
    if url.scheme == 'scgi' and path.startswith(('/', '~')):
        path = os.path.expanduser(path)
        return Address('unix', f'scgi://{path}', path)
    if url.scheme != 'scgi' or not port or url.path.strip('/'):
        raise UserError(f'{redacted(text)!r} is no address; {allowed}')
    exposed = host in ('', '0.0.0.0', '::')
    host = '127.0.0.1' if exposed else host
    shown = f'[{host}]' if ':' in host else host
    return Address('tcp', f'scgi://{shown}:{port}', '', host, port, exposed=exposed)


def redacted(text: Any) -> str:
    """Return a URL, or what was meant to be one, without the password in it.

    >>> redacted('http://me:secret@host/RPC2')
    'http://me:***@host/RPC2'
    """
    return re.sub(r'(?s)^((?:\w+://)?[^:/@]*):.*@', r'\1:***@', str(text))


class Deadline:
    """The moment by which a call must be over, whatever the other side does."""

    def __init__(self, seconds: float):
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def arm(self, sock: Any) -> None:
        """Give the socket what time is left; raises socket.timeout when there is none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise socket.timeout('timed out')
        sock.settimeout(left)


def scgi_request(address: Address, body: bytes, content_type: str, deadline: Deadline,
                 limit: int) -> bytes:
    """Send one SCGI request and return the body of its answer.

    Raises Unreachable; the text says what happened, the caller adds where and which method.
    """
    head = f'CONTENT_LENGTH\0{len(body)}\0SCGI\0001\0CONTENT_TYPE\0{content_type}\0'
    received, end, state = bytearray(), 0, 'connect'
    try:
        with scgi_connect(address, deadline) as sock:
            state = 'send'
            sock.sendall(b'%d:%s,%s' % (len(head), head.encode(), body))
            state = 'receive'
            while not end or len(received) < end:
                deadline.arm(sock)
                chunk = sock.recv(1 << 18)
                if not chunk:
                    break
                received += chunk
                end = end or answer_end(received, limit)
    except socket.timeout:
        waited = f'{deadline.seconds:g} s'
        raise Unreachable(
            f'no connection within {waited}' if state == 'connect' else
            f'only {len(received)} of {end or "?"} bytes came in {waited}' if received else
            f'connected, but no answer in {waited}: reading its session, or hung') from None
    except OSError as error:
        if state == 'send':
            raise Unreachable(f'the connection was closed during a request of {len(body)} '
                              'bytes: too large for it?') from None
        raise Unreachable(describe(error)) from None
    if not end or len(received) < end:
        raise Unreachable(f'the answer broke off after {len(received)} bytes' if received
                          else 'the connection was closed without an answer')
    if len(received) > end:
        raise Unreachable('the answer is longer than its Content-Length says')
    return bytes(received[received.index(b'\r\n\r\n') + 4:])


def scgi_connect(address: Address, deadline: Deadline) -> socket.socket:
    """Return a connected socket."""
    if address.kind == 'tcp':
        sock = socket.create_connection((address.host, address.port), deadline.seconds)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        deadline.arm(sock)
        if address.kind == 'unix':
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
    head = re.match(rb'Status: *200[^\n]*\n(?:.*\n)?content-length: *(\d+) *\r\n',
                    received[:stop + 2], re.I | re.S)
    if not head:
        raise Unreachable(f'the answer is not one of rTorrent: {quoted(beginning(received))}')
    if int(head[1]) > limit:
        raise Unreachable(f'the answer is larger than {show_size(limit)}, the limit')
    return stop + 4 + int(head[1])


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


class HttpAnswer(NamedTuple):
    """What a web server said; the names of headers are in lower case."""
    status: int
    reason: str
    headers: dict
    body: bytes


def http_handler(deadline: Deadline) -> Any:
    """Return urllib's handler for http and https, where every read obeys the deadline."""
    import http.client
    import io
    import urllib.request

    class Reader(socket.SocketIO):
        def readinto(self, buffer: Any) -> int | None:
            deadline.arm(self._sock)                    # type: ignore[attr-defined]
            return super().readinto(buffer)

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: Any, *args: Any, **kwargs: Any):
            super().__init__(sock, *args, **kwargs)
            sock._io_refs += 1                          # as its makefile() does
            self.fp = io.BufferedReader(Reader(sock, 'rb'))

    def connection(kind: Any, *args: Any, **kwargs: Any) -> Any:
        made = kind(*args, **kwargs)
        made.response_class = Response
        return made

    class Handler(urllib.request.HTTPSHandler):
        def http_open(self, request: Any) -> Any:
            return self.do_open(functools.partial(connection, http.client.HTTPConnection), request)

        def https_open(self, request: Any) -> Any:
            return self.do_open(functools.partial(connection, http.client.HTTPSConnection), request)

        http_request = urllib.request.AbstractHTTPHandler.do_request_

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
    opener = lib.OpenerDirector()
    opener.addheaders = [('User-Agent', f'torque/{VERSION}')]
    local = re.match(r'https?://(localhost|127\.|\[::1\])', url)
    for handler in (lib.ProxyHandler({} if local else None), http_handler(Deadline(seconds)),
                    digest, lib.HTTPBasicAuthHandler(passwords),
                    lib.HTTPErrorProcessor(), lib.HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    try:
        try:
            answer = opener.open(lib.Request(url, body, headers), timeout=seconds)
        except urllib.error.HTTPError as error:
            if error.fp is None:                        # Python 3.8, when a login was refused
                return HttpAnswer(error.code, str(error.reason), {}, b'')
            answer = error
        with answer:
            content = answer.read(limit + 1)
            left = answer.headers.get('Content-Length', '') if answer.code == 200 else ''
        if len(content) > limit:
            raise Unreachable(f'the answer is larger than {show_size(limit)}, the limit')
        if left.isdigit() and int(left) > len(content):
            raise Unreachable(f'the answer broke off after {len(content)} of {left} bytes')
        return HttpAnswer(answer.code, str(answer.reason), {
            name.lower(): value for name, value in answer.headers.items()}, content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, 'reason', error)
        if isinstance(error, http.client.IncompleteRead):
            raise Unreachable(f'the answer broke off after {len(error.partial)} bytes') from None
        if isinstance(reason, socket.timeout):
            raise Unreachable(f'no whole answer in {seconds:g} s') from None
        if 'scheme' in str(reason):
            raise Unreachable('HTTP 401: it asks for a login neither basic nor digest') from None
        if isinstance(reason, OSError):
            raise Unreachable(describe(reason)) from None
        raise Unreachable(f'not an answer of a web server: {quoted(reason)}') from None


def http_request(address: Address, body: bytes, content_type: str, deadline: Deadline,
                 limit: int) -> bytes:
    """Send a request to an HTTP mount of rTorrent and return the body of its answer."""
    answer = http_post(address.path, body, {'Content-Type': content_type}, deadline.seconds,
                       limit, address.user, address.password)
    if answer.status == 401:
        raise Unreachable('HTTP 401: user or password is wrong or missing')
    if answer.status != 200 or 'html' in answer.headers.get('content-type', ''):
        raise Unreachable(f'HTTP {answer.status} {answer.reason} instead of an answer of '
                          f'rTorrent: {quoted(beginning(answer.body))}')
    return answer.body


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


XML_CELL = r'(?:string>[^<]*</string>|i8>[^<]*</i8>|i4>[^<]*</i4>)'
XML_TOKEN = re.compile(                 # the groups are numbered 1, 2-3, 4-5, 6, ... 11
    r'<value><array>\s*<data>\s*<value><'               # an array of scalars alone: a row
    fr'({XML_CELL}(?:</value>\s*<value><{XML_CELL})*)</value>\s*</data>\s*</array></value>\s*'
    r'|<value>\s*<(string|i8|i4|int)>([^<]*)</\2>\s*</value>\s*'
    r'|<value>\s*<(boolean|base64)>([^<]*)</\4>\s*</value>\s*'
    r'|<value>\s*<(string|array>\s*<data|struct)\s*/>\s*(?:</array>\s*)?</value>\s*'
    r'|<value>([^<]*)</value>\s*'
    r'|<value>\s*<(array>\s*<data|struct)>\s*'
    r'|</(data>\s*</array|struct)>\s*</value>\s*'
    r'|<member>\s*<name>([^<]*)</name>\s*'
    r'|(</member>)\s*')
XML_BETWEEN = re.compile(r'</value>\s*<value><')
XML_HEAD = re.compile(r'\s*(?:<\?xml[^>]*\?>)?\s*<methodResponse>\s*'
                      r'(?:<params>\s*<param>|(<fault>))\s*')
XML_TAIL = re.compile(r'(?:</param>\s*</params>|</fault>)\s*</methodResponse>\s*')
XML_ENTITY = re.compile('&(?:#([0-9]+)|#x([0-9a-fA-F]+)|(lt|gt|amp|quot|apos));')
XML_ENTITIES = {'lt': '<', 'gt': '>', 'amp': '&', 'quot': '"', 'apos': "'"}


def xml_text(text: str) -> str:
    """Return character data with its entities replaced."""
    if '&' not in text:
        return text
    if len(XML_ENTITY.findall(text)) != text.count('&'):
        raise ValueError('an entity that XML-RPC does not have')
    return XML_ENTITY.sub(lambda found: chr(int(found[1])) if found[1] else chr(int(
        found[2], 16)) if found[2] else XML_ENTITIES[found[3]], text)


def xml_row(text: str) -> list:
    """Return the values of an array that holds only text and numbers."""
    cells = text.split('</value>\r\n<value><' if '\n<value' in text else '</value><value><')
    if len(cells) != text.count('<value') + 1:          # some other white space between them
        cells = XML_BETWEEN.split(text)
    row = [cell[7:-9] if cell[0] == 's' else int(cell[3:-5]) for cell in cells]
    return row if '&' not in text else [
        xml_text(cell) if isinstance(cell, str) and '&' in cell else cell for cell in row]


def xml_scan(text: str) -> tuple[Any, bool]:
    """Return the value in a methodResponse, and whether it is a fault.

    ValueError where the text is not what rTorrent or xmlrpc.client.dumps send.
    """
    head = XML_HEAD.match(text)
    if not head:
        raise ValueError('not a methodResponse')
    stack: list = [[]]                  # lists and dicts that are open; a name above its dict
    place = head.end()
    while True:
        token = XML_TOKEN.match(text, place)
        if not token:
            break
        place = token.end()
        kind = token.lastindex
        if kind == 8:
            stack.append({} if token[8] == 'struct' else [])
            continue
        if kind == 10:
            stack.append(xml_text(token[10]))
            continue
        if kind == 11:
            continue
        if kind == 1:
            value: Any = xml_row(token[1])
        elif kind == 9:
            value = stack.pop()
            if not stack or type(value) is not (dict if token[9] == 'struct' else list):
                raise ValueError('tags that do not match')
        else:
            value = xml_single(kind, token)
        if isinstance(stack[-1], str):
            stack[-2][stack.pop()] = value
        else:
            stack[-1].append(value)
    if len(stack) != 1 or len(stack[0]) != 1 or not XML_TAIL.fullmatch(text, place):
        raise ValueError(f'not understood at {text[place:place + 60]!r}')
    return stack[0][0], bool(head[1])


def xml_single(kind: int | None, token: re.Match) -> Any:
    """Return the value of a token that is a whole <value> and no row."""
    if kind == 3:
        return xml_text(token[3]) if token[2] == 'string' else int(token[3])
    if kind == 5:
        return xml_other(token[4], token[5])
    if kind == 6:
        return '' if token[6] == 'string' else {} if token[6] == 'struct' else []
    return xml_text(token[7])


def xml_other(name: str, content: str) -> Any:
    """Return a boolean, or the text in a base64: rTorrent sends so what is not UTF-8."""
    if name == 'base64':
        return binascii.a2b_base64(content).decode('utf-8', 'replace')
    if content.strip() not in ('0', '1'):
        raise ValueError(f'{content!r} is not a boolean')
    return content.strip() == '1'


def xml_reply(content: bytes) -> Any:
    """Return the value in the body of an answer; raises RpcError for a fault or a non-answer.

    What the scanner does not know is left to xmlrpc.client, but never a DTD.
    """
    text = content.decode('utf-8', 'replace')
    if text.count('\r') != text.count('>\r\n<') or any(      # as XML has it
            f'<{tag}>\r\n</' in text for tag in ('string', 'name', 'value')):
        text = text.replace('\r\n', '\n').replace('\r', '\n')
    try:
        value, fault = xml_scan(text)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        value, fault = xml_loads(text, str(error)), False
    if fault:
        raise rpc_fault(value)
    return value


def xml_loads(text: str, why: str) -> Any:
    """Return the value in an unusual answer, read by xmlrpc.client."""
    if '<!' in text:
        raise RpcError('the answer has a DTD or the like, which is refused')
    import xmlrpc.client
    from xml.parsers.expat import ExpatError
    try:
        return xmlrpc.client.loads(text, use_builtin_types=True)[0][0]
    except xmlrpc.client.Fault as fault:
        raise rpc_fault({'faultCode': fault.faultCode,
                         'faultString': fault.faultString}) from None
    except (ExpatError, xmlrpc.client.Error, ValueError, TypeError, LookupError,
            AttributeError, OverflowError):
        raise RpcError(f'the answer is not XML-RPC: {quoted(text[:80])} ({why[:80]})') from None


def rpc_fault(fault: Any) -> RpcError:
    """Return the exception for a fault; wordings differ, -506 alone is the same everywhere."""
    if not isinstance(fault, dict):
        return RpcError(f'a fault without a code: {quoted(fault)}')
    code, message = (fault.get('faultCode', fault.get('code')),
                     fault.get('faultString', fault.get('message')))
    if 'info-hash' in str(message):
        return HashNotFound(f'fault {code}: {quoted(message)}', code)
    hint = ''
    if 'untrusted' in str(message):
        hint = '; the web server in between marks its connections as untrusted: use scgi:// here'
    return RpcError(f'fault {code}: {quoted(message)}{hint}', code)


# JSON-RPC is answered by 0.15 and later. It is 15 times faster to read and carries every
# character, but a single name that is not UTF-8 turns a whole answer into an error.

JSON_NOT_UTF8 = 'invalid UTF-8'
ACTIONS = frozenset(                    # parts of the names of commands that change something
    'set start stop open close erase pause resume insert remove enable disable check_hash add '
    'create_link delete_link delete_tied disconnect disconnect_delayed send_scrape clear '
    'tracker_announce save_full_session save_resume push_back push_back_unique shutdown '
    'update_priorities try_start try_stop try_close set_create_queued set_resize_queued '
    'unset_create_queued unset_resize_queued call_target filter filter_on filter_all sort '
    'filter_download set_visible set_not_visible adjust_alloc prune save persistent set_kb '
    'open_local open_port open_systemd'.split())
READS = frozenset('d f t p view session system throttle network pieces directory download_list '
                  'equal not and or greater less match compare cat value false if'.split())


def only_reads(method: str, params: Iterable) -> bool:
    """Tell whether a call, and the commands in its parameters, change nothing."""
    words = [method]
    for param in params:
        words += re.findall(r'[a-z][\w.]*(?==)|(?<=\()[a-z][\w.]*', str(param))
    return all(parts[0] in READS and not ACTIONS.intersection(parts[1:])
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
    """Return the results of `count` calls, an RpcError in the place of each that failed."""
    try:
        items = json.loads(content.decode('utf-8', 'replace'))
    except (ValueError, RecursionError):
        items = None
    if isinstance(items, dict):
        if count > 1 and 'error' in items:
            raise rpc_fault(items['error'])
        items = [items]
    if not isinstance(items, list) or len(items) != count or not all(
            isinstance(item, dict) for item in items):
        raise RpcError(f'the answer is not JSON-RPC: {quoted(beginning(content))}')
    return [item['result'] if 'result' in item else rpc_fault(item.get('error'))
            for item in items]


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

    def __repr__(self) -> str:
        return f'<Proxy for {self.where}>'

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
        left, answers = list(calls), []
        while left:
            answers += self.ask(left[:BATCH])
            left = left[BATCH:]
        return answers

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
                answers = json_reply(content, len(calls))
                lost = next((answer for answer in answers if isinstance(answer, RpcError)
                             and JSON_NOT_UTF8 in str(answer)), None)
            except RpcError as error:
                lost = error
                if JSON_NOT_UTF8 not in str(error):
                    raise
            if not lost:
                return answers
            if not all(only_reads(method, params) for method, *params in calls):
                raise RpcError(f'the commands were run, but their answer is lost: {lost}')
            if len(self.xml_only) >= 1000:
                self.xml_only.clear()
            self.xml_only.add(question)
        if len(calls) == 1:
            try:
                return [xml_reply(self.send(xml_request(calls[0][0], calls[0][1:]), 'text/xml'))]
            except Unreachable:
                raise
            except RpcError as error:
                return [error]
        body = xml_request('system.multicall', [[
            {'methodName': method, 'params': params} for method, *params in calls]])
        answers = xml_reply(self.send(body, 'text/xml'))
        if not isinstance(answers, list) or len(answers) != len(calls):
            raise RpcError('system.multicall did not answer every call')
        return [answer[0] if isinstance(answer, list) and answer else rpc_fault(answer)
                for answer in answers]


class Method:
    """The name of a command, dots and all; calling it calls the command."""
    __slots__ = ('_proxy', '_name')

    def __init__(self, proxy: Proxy, name: str):
        self._proxy, self._name = proxy, name

    def __getattr__(self, name: str) -> Method:
        return Method(self._proxy, f'{self._name}.{name}')

    def __call__(self, *params: Any) -> Any:
        return self._proxy.call(self._name, *params)


def refuse_deadly(method: str, params: list) -> None:
    """Refuse f.x(HASH) without a file's index, in any disguise: rTorrent 0.9.8 dies of it."""
    if method == 'system.multicall':
        for entry in params[0] if params else ():
            refuse_deadly(entry['methodName'], list(entry['params']))
    listing = '.multicall' in method and not method.startswith('f.') and any(
        re.search(r'(?<![\w.])f\.(?!multicall)[a-z]', str(param)) for param in params)
    if listing or (method.startswith('f.') and 'multicall' not in method
                   and ':f' not in (str(params[0]) if params else '')):
        raise RpcError(f'{method} needs a target HASH:fINDEX; without it rTorrent would abort')

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
RC_FILES = ('~/.rtorrent.rc', '~/.config/rtorrent/rtorrent.rc')
RC_ADDRESS = ('network.scgi.open_local', 'scgi_local', 'network.scgi.open_port', 'scgi_port')


class Stats(NamedTuple):
    """One look at rTorrent: bytes, bytes a second, counts. What it does not tell is None."""
    engine_id: str
    version: str
    uptime: float | None                # seconds
    up_rate: int | None
    up_limit: int | None                # 0: no limit
    up_total: int | None
    down_rate: int | None
    down_limit: int | None
    down_total: int | None
    open_sockets: int | None
    max_open_sockets: int | None
    open_files: int | None
    max_open_files: int | None
    views: dict                         # name: size
    rpc_time: float                     # seconds that the answer took


class Engine:
    """One rTorrent; every method raises RpcError when it does not answer as it should."""

    def __init__(self, url: str, timeout: float = RPC_TIMEOUT, limit: int = RPC_LIMIT):
        self.address = parse_address(url)
        self.timeout, self.limit = timeout, limit
        self.log = logging.getLogger('torque.engine')
        self.lock = threading.Lock()
        self.proxy: Proxy | None = None
        self.gone_since: float | None = None
        self.stamp: Any = None
        self.pid: int | None = None
        self.methods: frozenset = frozenset()
        self.engine_id, self.session_path, self.versions = '', '', ('', '')
        self.startup: float | None = None

    def open(self) -> Proxy:
        """Return a Proxy to call rTorrent with, after a look at what it offers."""
        stamp = self.socket_stamp()
        proxy = self.proxy
        if proxy is None or stamp != self.stamp:
            proxy = self.look()
            self.stamp = stamp
        return proxy

    def socket_stamp(self) -> Any:
        """Return what identifies the socket file: a restarted rTorrent makes a new one."""
        try:
            found = os.stat(self.address.path) if self.address.kind == 'unix' else None
        except OSError:
            return None
        return found and (found.st_ino, found.st_ctime_ns)

    def send(self, body: bytes, content_type: str) -> bytes:
        """Carry a request to rTorrent and the body of the answer back."""
        request = http_request if self.address.kind == 'http' else scgi_request
        self.log.log(TRACE, 'to %s: %s', self.address.where, quoted(beginning(body), 400))
        return request(self.address, body, content_type, Deadline(self.timeout), self.limit)

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
        names = ['session.name', 'session.path', 'system.client_version',
                 'system.library_version', 'system.pid', 'startup_time', 'network.rpc.use_jsonrpc']
        answers = dict(zip(names, proxy.batch([(name, '') for name in names])))
        known = {name: value for name, value in answers.items()
                 if not isinstance(value, RpcError)}
        with self.lock:
            self.methods = frozenset(methods)
            self.engine_id = str(known.get('session.name', self.address.where))
            self.session_path = str(known.get('session.path', ''))
            self.versions = (str(known.get('system.client_version', '?')),
                             str(known.get('system.library_version', '?')))
            self.pid = known.get('system.pid')
            self.startup = known.get('startup_time') or process_start(self.pid, self.address)
            proxy.speaks_json = known.get('network.rpc.use_jsonrpc') == 1
            self.proxy = proxy
        return proxy

    def has(self, method: str) -> bool:
        """Tell whether this rTorrent offers a command."""
        self.open()
        return method in self.methods

    @property
    def uptime(self) -> float | None:
        """Seconds since rTorrent was started, None where that cannot be known."""
        return None if self.startup is None else max(time.time() - self.startup, 0)

    def stats(self) -> Stats:
        """Return rTorrent's figures, asked in one round trip."""
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
        return Stats(engine_id=self.engine_id, version='/'.join(self.versions),
                     uptime=self.uptime, rpc_time=rpc_time,
                     views=dict(zip(VIEWS, values[len(commands):])),
                     **{field: gauges.get(command) for field, command in GAUGES.items()})


def process_start(pid: int | None, address: Address) -> float | None:
    """Return when a local rTorrent process was started, in Unix seconds; None if not known."""
    if not pid or not address.is_local():
        return None
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as stat:
            name, _, fields = stat.read().partition('(')[2].rpartition(')')
        if not name.startswith('rtorrent'):             # the pid belongs to a container
            return None
        began = int(fields.split()[19]) / os.sysconf('SC_CLK_TCK')
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def find_url(rc_file: str | None) -> str:
    """Return the scgi_url that rTorrent's own configuration gives.

    rc_file None: the first of RC_FILES that exists. Raises UserError naming what was read.
    """
    for name in [rc_file] if rc_file else RC_FILES:
        path = os.path.expanduser(os.path.expandvars(name))
        if not os.path.isfile(path):
            continue
        settings = read_rc(path)
        for key in RC_ADDRESS:
            if key in settings:
                url = rc_value(settings[key], settings)
                return os.path.expanduser(url) if key.endswith('local') else 'scgi://' + url
        raise UserError(f'{path} opens no SCGI port or socket (network.scgi.open_local); '
                        'set scgi_url in [TORQUE]')
    raise UserError('scgi_url is not set in [TORQUE], and there is no '
                    f"{rc_file or ' or '.join(RC_FILES)} (rtorrent_rc) to take it from")


def read_rc(path: str, depth: int = 0) -> dict:
    """Return the commands of an rc and of the files it imports; later ones win."""
    settings: dict = {}
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
                try:
                    target = os.path.expanduser(rc_value(value, settings))
                    settings.update(read_rc(os.path.join(os.path.dirname(path), target),
                                            depth + 1))
                except UserError:
                    if key == 'import':
                        raise
            elif key == 'method.insert':
                name, *rest = split_outside(value, ',')
                if len(rest) > 1:
                    settings[name.strip()] = rest[-1].strip()
            else:
                settings[{'session.path.set': 'session', 'session.path': 'session',
                          'directory.default.set': 'directory.default'}.get(key, key)] = value
    return settings


def split_outside(text: str, mark: str) -> list[str]:
    """Return text split at marks that are outside of quotes and parentheses."""
    parts, depth, inside = [''], 0, False
    for char in text:
        if char == '"':
            inside = not inside
        elif not inside:
            depth += {'(': 1, ')': -1, '{': 1, '}': -1}.get(char, 0)
        if char == mark and not inside and depth <= 0:
            parts.append('')
        else:
            parts[-1] += char
    return parts


def rc_value(text: str, settings: dict, depth: int = 0) -> str:
    """Return what an rc's value comes to: text, (command,args) or $command=args."""
    text = text.strip()
    if depth > 20:
        raise UserError(f'rtorrent.rc: {text!r} refers to itself; set scgi_url in [TORQUE]')
    if text.startswith('"') and text.endswith('"') and len(text) > 1:
        text = text[1:-1]
    if text.startswith('(') and text.endswith(')'):
        name, *args = split_outside(text.strip('()') if text.count('(') == 1 else text[1:-1], ',')
    elif text.startswith('$'):
        name, _, rest = text[1:].partition('=')
        args = split_outside(rest, ',') if rest else []
    else:
        return text
    name = name.strip()
    values = [rc_value(arg, settings, depth + 1) for arg in args]
    if name == 'cat':
        return ''.join(values)
    if name == 'system.env':
        return os.environ.get(values[0] if values else '', '')
    if name == 'session.path' and 'session' in settings:
        return os.path.expanduser(rc_value(settings['session'], settings, depth + 1)) \
            .rstrip('/') + '/'
    if name in settings:
        return rc_value(settings[name], settings, depth + 1)
    raise UserError(f'the address in rtorrent.rc needs rTorrent to work out {name!r}; '
                    'set scgi_url in [TORQUE]')


# --- Jobs ------------------------------------------------------------------------------------
# A job is made from its settings (`config`) and run() is called when it is due. It talks to
# its engine and to nothing above: files, threads and signals are other sections' business.
# Built-in jobs list their options in a table that checks the ini and prints the help.

class Settings(dict):
    """Settings by name: config.path or config['path']; as an attribute, None when missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return self.get(name)

    __setattr__ = dict.__setitem__

    def __repr__(self) -> str:
        return repr({name: '***' if re.search('password|token', name) and value else
                     redacted(value) if isinstance(value, str) else value
                     for name, value in self.items()})


class JobConfig(Settings):
    """The settings of one job: job.NAME.* without that prefix, job_name, dry_run, active.

    engine is the job's rTorrent. state_dir is where it may keep a file, None where it may not.
    """
    __slots__ = ('engine', 'state_dir')
    engine: Any
    state_dir: str | None
    __setattr__ = object.__setattr__


class Option(NamedTuple):
    """An option of a built-in job: how its text is read, its default, a line of help."""
    name: str
    parse: Callable[[Any], Any]
    default: Any
    help: str

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
    options: tuple | None = None        # None: any option is taken, as the ini has it
    section = ''                        # the ini section that gives options their defaults

    def __init__(self, config: JobConfig):
        self.config = config
        self.LOG = get_class_logger(self)
        self.engine: Engine = config.engine
        self.dry_run = bool(config.dry_run)

    def act(self, method: str, *params: Any) -> Any:
        """Call a command that changes something in rTorrent; a dry run only says so."""
        if self.dry_run:
            self.LOG.info('dry run, not done: %s %s', method,
                          ' '.join(quoted(param) for param in params))
            return None
        return self.engine.open().call(method, *params)


class EngineStats(Job):
    """Log a line on rTorrent's state: version, torrents, traffic, speed of its answer."""
    options = ()

    def run(self) -> None:
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


def replace_file(path: str, text: str) -> None:
    """Write a file of the user's own, whole or not at all, whatever happens meanwhile."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    handle = os.open(path + '.new', os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, 'w', encoding='utf-8') as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(path + '.new', path)


def parse_tags(text: str) -> dict[str, str]:
    """Return the tags in `name=value, name=value`."""
    tags = {part.partition('=')[0].strip(): part.partition('=')[2].strip()
            for part in text.split(',') if part.strip()}
    if not all(name and value for name, value in tags.items()):
        raise UserError(f'{text!r} are not tags; allowed is name=value, name=value')
    return tags


def parse_web_url(text: str) -> str:
    """Return the base URL of a web server."""
    if not re.match(r'https?://[^/@\s]+(/\S*)?$', text):
        raise UserError(f'{redacted(text)!r} is no web address; allowed is http(s)://host:port, '
                        'with user and password as settings')
    return text.rstrip('/')


def parse_api(text: str) -> int:
    """Return the version of InfluxDB's interface to use, 0 to choose by the settings."""
    if str(text) not in ('', '1', '2', '3'):
        raise UserError(f'{text!r} is no version of the interface; allowed are 1, 2, 3')
    return int(text or 0)


def influx_line(series: str, tags: dict, fields: dict, when: float) -> str:
    """Return a point in line protocol, with milliseconds; fields that are None are left out.

    >>> influx_line('s', {'a b': 'c,d'}, {'n': 1, 'x': 0.5, 't': 'y"', 'z': None}, 2)
    's,a\\\\ b=c\\\\,d n=1i,x=0.5,t="y\\\\"" 2000'
    """
    def escape(text: Any) -> str:
        return re.sub(r'([,= ])', r'\\\1', re.sub(r'[\x00-\x1f\\]+', ' ', str(text)).strip())

    def value(item: Any) -> str:
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
    try:
        figures.update(zip(('load1', 'load5', 'load15'), os.getloadavg()))
        with open('/proc/meminfo', encoding='ascii') as stream:
            memory = dict(re.findall(r'(\w+): +(\d+) kB', stream.read()))
        for name, key in (('memory_total', 'MemTotal'), ('memory_available', 'MemAvailable'),
                          ('swap_total', 'SwapTotal'), ('swap_free', 'SwapFree')):
            if key in memory:
                figures[name] = int(memory[key]) * 1024
        with open('/proc/net/dev', encoding='ascii') as stream:
            rows = [line.partition(':')[2].split() for line in stream
                    if ':' in line and not line.lstrip().startswith('lo:')]
        figures.update(net_received=sum(int(row[0]) for row in rows),
                       net_sent=sum(int(row[8]) for row in rows))
    except OSError:                     # not Linux: what could be had
        pass
    return figures


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
        Option('series', str, 'rtorrent', 'series for rTorrent data, and <series>_views; '
                                          'empty for none'),
        Option('series_host', str, 'host', 'series for host data; empty for none'),
        Option('disk_path', str, '~', 'paths whose disks are measured, separated by :'),
        Option('tags', parse_tags, '', 'tags for every point: name=value, name=value'),
        Option('buffer', parse_count, '10000', 'most points kept while the server is away'))
    BATCH = 5000                        # lines in one request
    LONGEST_PAUSE = 300                 # seconds between tries

    def __init__(self, config: JobConfig):
        super().__init__(config)
        if not config.series and not config.series_host:
            raise UserError('series and series_host are both empty: nothing to push')
        self.api = config.api or (2 if config.org or config.bucket else 1)
        self.batch, self.pause, self.retry_at, self.saved_at = self.BATCH, 0.0, 0.0, 0.0
        self.problem = ''
        self.file = config.state_dir and os.path.join(config.state_dir,
                                                      f'{config.job_name}.points')
        self.points: collections.deque = collections.deque(self.load(), config.buffer or 1)

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
        if not self.file:
            return
        try:
            if self.points:
                replace_file(self.file, '\n'.join(self.points) + '\n')
            elif os.path.exists(self.file):
                os.remove(self.file)
        except OSError as error:
            self.LOG.warning('%d points cannot be saved: %s', len(self.points), error)

    cleanup = save

    def run(self) -> None:
        lines, problem = self.measure()
        if self.dry_run:
            self.LOG.info('dry run, not sent to %s: %s', self.config.url, ' | '.join(lines))
        else:
            lost = len(self.points) + len(lines) - (self.points.maxlen or 0)
            self.points.extend(lines)
            try:
                self.deliver()
            except LoggableError as error:
                kept = f'{len(self.points)} points are kept' if self.file else 'nothing is kept'
                dropped = f', the oldest {lost} dropped' if lost > 0 else ''
                raise LoggableError(f'{error}; {kept}{dropped}') from None
            finally:
                if elapsed_time() - self.saved_at >= 60 or not self.points:
                    self.save()
        if problem:
            raise problem

    def measure(self) -> tuple[list[str], LoggableError | None]:
        """Return the points of this moment, and what kept rTorrent's from being among them."""
        config, now = self.config, time.time()
        lines: list[str] = []
        problem: LoggableError | None = None
        if config.series:
            try:
                stats = self.engine.stats()._asdict()
                views, name = stats.pop('views'), stats['engine_id'].partition(':')[0]
                uptime = stats.pop('uptime')
                tags = {'host': name, **config.tags}
                lines.append(influx_line(config.series, tags, {
                    **stats, 'uptime': None if uptime is None else int(uptime)}, now))
                if any(size is not None for size in views.values()):
                    lines.append(influx_line(config.series + '_views', tags, views, now))
            except RpcError as error:
                problem = error
        if config.series_host:
            tags = {'host': socket.gethostname(), **config.tags}
            lines.append(influx_line(config.series_host, tags, host_figures(), now))
            for path in filter(None, config.disk_path.split(os.pathsep)):
                try:
                    disk = os.statvfs(os.path.expanduser(path))
                except OSError as error:
                    problem = problem or LoggableError(f'disk_path {path!r}: {error.strerror}')
                    continue
                lines.append(influx_line(config.series_host, {'disk': path, **tags}, {
                    'disk_total': disk.f_blocks * disk.f_frsize,
                    'disk_free': disk.f_bavail * disk.f_frsize}, now))
        return lines, problem

    def deliver(self) -> None:
        """Send all points, oldest first; raises LoggableError when some have to wait."""
        if self.problem and elapsed_time() < self.retry_at:
            raise LoggableError(self.problem)
        while self.points:
            lines = list(itertools.islice(self.points, self.batch))
            try:
                self.post(lines)
            except LoggableError as error:
                self.problem = f'{self.config.url}: {error}'
                self.pause = min(max(self.pause * 2, 5), self.LONGEST_PAUSE)
                self.retry_at = elapsed_time() + (error.pause or self.pause)
                raise LoggableError(self.problem) from None
            self.problem, self.pause = '', 0.0
            for _ in lines:
                self.points.popleft()

    def post(self, lines: list[str]) -> None:
        """Write points, in parts where the server wants that; drop what it calls malformed.

        Raises LoggableError when they have to be kept.
        """
        answer = self.request('\n'.join(lines).encode())
        if answer.status in (200, 204):
            return
        said = f'HTTP {answer.status} {answer.reason} {quoted(beginning(answer.body))}'
        if answer.status == 413 and len(lines) > 1:
            half = self.batch = len(lines) // 2
            self.post(lines[:half])
            self.post(lines[half:])
        elif answer.status in (400, 413, 422):
            series = {re.split(r'(?<!\\)[, ]', line)[0] for line in lines}
            if len(series) == 1:
                self.LOG.warning('%s: %d points of %s were refused and dropped: %s',
                                 self.config.url, len(lines), series.pop(), said)
                return
            for name in sorted(series):         # one bad series must not cost the others
                self.post([line for line in lines if re.split(r'(?<!\\)[, ]', line)[0] == name])
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
            1: ('/write', {'db': config.dbname, 'precision': 'ms'}),
            2: ('/api/v2/write', {'org': config.org, 'bucket': config.bucket or config.dbname,
                                  'precision': 'ms'}),
            3: ('/api/v3/write_lp', {'db': config.dbname, 'precision': 'millisecond'})}[self.api]
        headers = {'Content-Type': 'text/plain; charset=utf-8'}
        token = config.token or read_secret(config.token_file)
        password = config.password or read_secret(config.password_file)
        if token:
            headers['Authorization'] = f"{'Bearer' if self.api == 3 else 'Token'} {token}"
        elif config.user:
            login = f'{config.user}:{password}'.encode()
            headers['Authorization'] = f'Basic {binascii.b2a_base64(login, newline=False).decode()}'
        if config.gzip:
            import gzip
            body, headers['Content-Encoding'] = gzip.compress(body), 'gzip'
        return http_post(f'{config.url}{path}?{urlencode(query)}', body, headers,
                         config.timeout)


def read_secret(path: str) -> str:
    """Return the first line of a file that holds a password or token; '' for no file."""
    if not path:
        return ''
    try:
        with open(os.path.expanduser(path), encoding='utf-8') as stream:
            return stream.readline().strip()
    except (OSError, ValueError) as error:
        raise LoggableError(f'{path}: {getattr(error, "strerror", "") or error}') from None


# --- Config ----------------------------------------------------------------------------------
# torque.ini becomes entries (value and place), entries become settings, settings become jobs.
# Every mistake is collected as one line `file:line: setting: what is wrong; what is allowed`;
# only when there is none does anything start. config_ini is the configuration as jobs see it.

DEFAULTS = """
[TORQUE]
queue_startable_base = is_open=no is_active=no is_complete=no
job.connstats.handler = torque:EngineStats
job.connstats.schedule = minute=*
job.fluxstats.handler = torque:InfluxDB
job.fluxstats.schedule = second=*/15
job.fluxstats.active = False
job.queue.handler = torque:QueueManager
job.queue.schedule = second=*/15
job.queue.active = False
job.treewatch.handler = torque:TreeWatch
job.treewatch.schedule = hour=*
job.treewatch.active = False
"""
HANDLERS = {                            # names that pyrocore and pyrosimple have for our jobs
    **{f'{package}.{name}': ours for package in ('pyrocore.torrent', 'pyrocore.job',
                                                 'pyrosimple.torrent', 'pyrosimple.job')
       for name, ours in {
           'jobs:EngineStats': 'EngineStats', 'metrics:EngineStats': 'EngineStats',
           'jobs:InfluxDBStats': 'InfluxDB', 'jobs:InfluxDB': 'InfluxDB',
           'queue:QueueManager': 'QueueManager', 'watch:TreeWatch': 'TreeWatch',
           'action:Action': 'Action', 'action:Command': 'Command',
           'action:ItemCommand': 'ItemCommand', 'move_path:PathMover': 'Move'}.items()}}
SECTIONS = ('TORQUE', 'INFLUXDB', 'ANNOUNCE')
CORE_OPTIONS = (                        # what any job has
    Option('handler', str, '', 'module:Class of the job'),
    Option('schedule', str, '', 'when it runs'),
    Option('active', parse_bool, 'yes', 'no: the job is ignored'),
    Option('dry_run', parse_bool, 'no', 'only say what would be done'),
    Option('scgi_url', str, '', 'rTorrent of this job; left out, that of [TORQUE]'),
    Option('log_level', str, '', 'DEBUG, INFO, WARNING or ERROR'),
    Option('max_runtime', parse_duration, '', 'a run is called overdue after this time'))
TORQUE_OPTIONS = (                      # what [TORQUE] has beside jobs
    Option('scgi_url', str, '', 'where rTorrent answers; left out, rtorrent_rc tells'),
    Option('rtorrent_rc', str, '', "rTorrent's configuration"),
    Option('rpc_timeout', parse_duration, '30s', 'most time for one call to rTorrent'),
    Option('rpc_limit', parse_size, '256m', 'largest answer of rTorrent that is read'),
    Option('grace', parse_duration, '10s', 'time for runs in progress at the end'),
    Option('state_dir', str, '', 'folder for what must survive a restart'),
    Option('queue_startable_base', str, '', 'condition that any startable item must meet'))
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
        def number(line: str) -> int:
            match = re.match(r'[^:]*:(\d+): ', line)
            return int(match[1]) if match else 0
        self.lines = [one_line(line) for line in sorted(lines, key=number)]
        super().__init__('\n'.join(self.lines))


class Ini:
    """The entries of configuration files by section and key, mistakes, and warnings."""

    def __init__(self) -> None:
        self.sections: dict[str, dict[str, Entry]] = {'TORQUE': {}}
        self.mistakes: list[str] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []

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
            cut = re.search(r'\s;', text)
            header = re.match(r'\[([^]]+)\]', text)
            entry = re.match(r'([^=:[][^=:]*)[=:](.*)', text[:cut.start()] if cut else text)
            if deeper and key:
                found[section, key][0] += '\n' + text
                if re.match(rf"(job\.[\w.-]+|{'|'.join(TORQUE_NAMES)}) *[=:]", text):
                    self.warnings.append(f'{place}: an indented line belongs to the value above '
                                         f'it: {quoted(text, 60)}')
            elif deeper:                        # goes on a line that was refused
                continue
            elif header:
                section, key, indent = header[1].upper(), '', None
            elif not section or not entry:
                self.mistakes.append(f'{place}: {quoted(text, 60)} ' + (
                    'is neither KEY = VALUE nor [SECTION]' if section or text[0] == '['
                    else 'stands before any [SECTION]; settings belong under [TORQUE]'))
                section, key, indent = section or '?', '', depth
            else:
                if cut and '=' in text[cut.end():]:
                    self.warnings.append(f'{place}: text after `;` is a comment: '
                                         f'{quoted(text[cut.end():].strip(), 60)}')
                key, indent = entry[1].strip(), depth
                found[section, key] = [entry[2].strip(), place]
        for (section, key), (value, place) in found.items():
            self.add(section, key, '' if value == '""' else value, place)

    def add(self, section: str, key: str, value: str, place: str) -> None:
        """Add one entry; a later one replaces an earlier one."""
        if re.search(r'%\(\w+\)s', value.replace('%%', '')):
            self.mistakes.append(f'{place}: {key}: {quoted(value, 60)}: nothing is interpolated; '
                                 'write the value itself, and %% for %')
        self.sections.setdefault(section, {})[key] = Entry(value.replace('%%', '%'), place)

    def warn_of_strangers(self) -> None:
        """Warn of settings that torque has no use for and that look like others."""
        for section, entries in self.sections.items():
            place = next(iter(entries.values())).place if entries else ''
            close = nearest(section, SECTIONS)
            if close and section not in SECTIONS:
                self.warnings.append(f'{place}: section [{section}] means nothing to torque{close}')
        for key, entry in self.sections['TORQUE'].items():
            stem = key.partition('.')[0]
            if stem not in (*TORQUE_NAMES, 'job', 'apscheduler', 'httpd') and (
                    nearest(stem, [*TORQUE_NAMES, 'job']) or stem.lower() == 'job'):
                self.warnings.append(f'{entry.place}: {key} means nothing to torque'
                                     f"{nearest(stem.lower() + ' ', [*TORQUE_NAMES, 'job'])}")


def convert(text: str) -> Any:
    """Return a value as pyrocore's jobs expect it: digits as int, words of truth as bool.

    >>> convert('12'), convert('No'), convert('text')
    (12, False, 'text')
    """
    if text.isascii() and text.isdigit():
        return int(text)
    return {'true': True, 'yes': True, 'on': True,
            'false': False, 'no': False, 'off': False}.get(text.lower(), text)


def import_handler(text: str) -> Any:
    """Return the class that `module.path:ClassName` names."""
    text = text.replace('::', ':')
    if not re.fullmatch(r'[^\W\d][\w.]*:\w+', text):
        raise UserError(f'{text!r} is no handler; allowed is module.path:ClassName')
    module, name = text.split(':')
    if text in HANDLERS:
        module, name = 'torque', HANDLERS[text]
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


class PlannedJob(NamedTuple):
    """A job that can be made; place is where the user's file speaks of it."""
    name: str
    make: Callable[[JobConfig], Any]
    config: JobConfig
    schedule: Schedule
    place: str


class Config(Settings):
    """The loaded configuration: engine, torque, other sections in lower case.

    Empty at import; load() fills it in place, so `from torque import config_ini` is safe.
    """
    __slots__ = ('path', 'engine', 'engines', 'state_dir', 'jobs', 'warnings', 'notes')
    __setattr__ = object.__setattr__
    path: str
    engine: Any
    engines: dict[str, Engine]
    state_dir: str
    jobs: list[PlannedJob]
    warnings: list[str]
    notes: list[str]

    def load(self, path: str, overrides: Iterable[str] = (), dry_run: bool = False,
             only: str | None = None) -> None:
        """Read a file and plan its active jobs, or `only` one; raises Mistakes."""
        ini = read_files(path, overrides)
        ini.warn_of_strangers()
        torque = ini.sections['TORQUE']
        options = checked(TORQUE_OPTIONS, torque, '', ini.mistakes)
        groups = group_jobs(torque, ini)
        if only and only not in groups:
            raise UnknownJob(f"there is no job {only!r}; the jobs are {' '.join(sorted(groups))}"
                             f'{nearest(only, groups)}')
        self.path, self.warnings, self.notes = path, ini.warnings, ini.notes
        self.clear()
        self.update({name.lower(): Settings((key, entry.value) for key, entry in entries.items())
                     for name, entries in ini.sections.items()})
        self['torque'] = Settings((key, convert(entry.value)) for key, entry in torque.items())
        self['torque'].update(options)
        self.state_dir = os.path.expanduser(options.state_dir) or default_state_dir(path)
        self.engines = {}
        self.engine = self.find_engine(torque, 'scgi_url', ini.mistakes)
        folder = os.path.dirname(os.path.realpath(path))
        if folder not in sys.path:
            sys.path.append(folder)
        self.jobs = []
        for name in [only] if only else groups:
            planned = plan_job(name, groups[name], ini, dry_run, bool(only))
            if planned:
                planned.config.engine = self.find_engine(
                    groups[name], f'job.{name}.scgi_url', ini.mistakes) \
                    if planned.config.scgi_url else self.engine
                planned.config.state_dir = None if only else self.state_dir
                self.jobs.append(planned)
        if ini.mistakes:
            raise Mistakes(ini.mistakes)

    def find_engine(self, entries: dict[str, Entry], key: str, mistakes: list[str]) -> Any:
        """Return the Engine for scgi_url; without one for what rTorrent's own rc says."""
        entry, rc = entries.get('scgi_url'), entries.get('rtorrent_rc')
        url = entry.value if entry else ''
        try:
            if not url and mistakes:            # it may be among what was not understood
                return None
            if not url:
                url, key = find_url(self.torque.rtorrent_rc), 'rtorrent_rc'
            if url not in self.engines:
                engine = self.engines[url] = Engine(url, self.torque.rpc_timeout or RPC_TIMEOUT,
                                                    self.torque.rpc_limit or RPC_LIMIT)
                if engine.address.exposed:
                    self.warnings.append(
                        f'{url}: the RPC port of rTorrent is open to the network: whoever reaches '
                        'it runs commands as you; bind it to 127.0.0.1 or use a socket')
            return self.engines[url]
        except UserError as error:
            place = entry.place if entry else rc.place if rc else self.path
            mistakes.append(f'{place}: {key}: {error}')
            return None

    def make_jobs(self) -> dict[str, Any]:
        """Return the job objects by name; raises Mistakes."""
        made, mistakes = {}, []
        for planned in self.jobs:
            try:
                job = made[planned.name] = planned.make(planned.config)
                if not callable(getattr(job, 'run', None)):
                    raise UserError('the class has no run()')
            except UserError as error:
                mistakes.append(f'{planned.place}: job.{planned.name}: {error}')
            except (Exception, SystemExit) as error:
                mistakes.append(f'{planned.place}: job.{planned.name} cannot be made: '
                                f'{origin(error)}')
        if mistakes:
            raise Mistakes(mistakes)
        return made


def read_files(path: str, overrides: Iterable[str]) -> Ini:
    """Return the entries of the defaults, of the user's file over them, and of -D over both."""
    ini = Ini()
    ini.read(DEFAULTS.splitlines(), '<defaults>')
    try:
        with open(path, encoding='utf-8') as stream:
            ini.read(stream, path)
    except UnicodeDecodeError as error:
        raise Mistakes([f'{path}: not UTF-8 text: {error.reason} at byte {error.start}']) from None
    except OSError as error:
        raise Mistakes([f'{path}: {error.strerror}']) from None
    for text in overrides:
        key, equals, value = text.partition('=')
        section, dot, rest = key.strip().partition('.')
        if not equals or not key.strip():
            ini.mistakes.append(f'-D {text}: allowed is KEY=VALUE or section.KEY=VALUE')
        elif dot and section.upper() in {*ini.sections, *SECTIONS}:
            ini.add(section.upper(), rest, value.strip(), '-D')
        elif dot and section.lower() not in ('job', 'apscheduler', 'httpd'):
            ini.mistakes.append(f'-D {text}: there is no section [{section.upper()}]')
        else:
            ini.add('TORQUE', key.strip(), value.strip(), '-D')
    return ini


def group_jobs(torque: dict[str, Entry], ini: Ini) -> dict[str, dict[str, Entry]]:
    """Return the entries of each job by name; note what only pyrocore has a use for."""
    groups: dict[str, dict[str, Entry]] = {}
    ignored = set()
    for key, entry in torque.items():
        stem, _, rest = key.partition('.')
        name, dot, param = rest.partition('.')
        if stem in ('apscheduler', 'httpd') and rest:
            ignored.add(f'{stem}.*')
        elif stem == 'job' and name and param:
            groups.setdefault(name, {})[param] = entry
        elif stem == 'job':
            ini.mistakes.append(f'{entry.place}: {key}: allowed is job.NAME.PARAM')
    for name, entries in groups.items():
        if 'handler' not in entries and nearest(name, [other for other in groups if other != name]):
            ini.warnings.append(f'{next(iter(entries.values())).place}: job.{name} has no handler'
                                f'{nearest(name, [other for other in groups if other != name])}')
    if ignored:
        ini.notes.append(f"settings of pyrocore without a use here: {' '.join(sorted(ignored))}")
    return groups


def checked(options: Iterable[Option], entries: dict[str, Entry], prefix: str,
            mistakes: list[str], defaults: dict | None = None) -> Settings:
    """Return the values of options, noting the mistakes in them."""
    values = Settings()
    for option in options:
        entry = entries.get(option.name) or (defaults or {}).get(option.name)
        text = entry.value if entry else option.default
        if text == '' and (option.parse in (parse_duration, parse_size, parse_count, parse_bool)):
            text = option.default
        try:
            values[option.name] = None if text == '' and option.parse is parse_duration else \
                option.parse(text)
        except UserError as error:
            mistakes.append(f"{entry.place if entry else '<defaults>'}: "
                            f'{prefix}{option.name}: {error}')
            values[option.name] = None
    return values


def plan_job(name: str, entries: dict[str, Entry], ini: Ini, dry_run: bool,
             force: bool) -> PlannedJob | None:
    """Return an active job ready to be made, None for any other and for one with mistakes."""
    prefix, before = f'job.{name}.', len(ini.mistakes)
    own = [entry.place for entry in entries.values() if not entry.place.startswith('<')]
    first = own[0] if own else '<defaults>'
    core = checked(CORE_OPTIONS, entries, prefix, ini.mistakes)
    if len(ini.mistakes) == before and not core.active and not force:
        return None
    make, schedule = None, None
    for key in ('handler', 'schedule'):
        entry = entries.get(key)
        try:
            if not entry or not entry.value:
                raise UserError('is missing; a job needs a handler and a schedule')
            if key == 'handler':
                make = import_handler(entry.value)
            else:
                schedule = parse_schedule(entry.value)
                if schedule.next(time.time()) is None:
                    raise UserError(f'{entry.value!r} lies in the past: it would never fire')
        except UserError as error:
            ini.mistakes.append(f'{entry.place if entry else first}: {prefix}{key}: {error}')
    if core.log_level and core.log_level.upper() not in ('DEBUG', 'INFO', 'WARNING', 'ERROR'):
        ini.mistakes.append(f"{entries['log_level'].place}: {prefix}log_level: "
                            f'{core.log_level!r}; allowed are DEBUG INFO WARNING ERROR')
    config = JobConfig((key, entry.value if key in ('handler', 'schedule') else
                        convert(entry.value)) for key, entry in entries.items())
    if isinstance(make, type) and issubclass(make, Job) and make.options is not None:
        known = [option.name for option in (*CORE_OPTIONS, *make.options)]
        for key in set(entries).difference(known):
            ini.mistakes.append(f'{entries[key].place}: {prefix}{key}: {make.__name__} has no such '
                                f'option{nearest(key, known) or "; see --list-jobs"}')
        shared = ini.sections.get(make.section, {})
        for key in set(shared).difference(known):
            ini.mistakes.append(f'{shared[key].place}: {key}: {make.__name__} has no such '
                                f'option{nearest(key, known) or "; see --list-jobs"}')
        config.update(checked(make.options, entries, prefix, ini.mistakes, shared))
    config.update(core, job_name=name, active=core.active, dry_run=core.dry_run or dry_run)
    if len(ini.mistakes) > before or not make or not schedule:
        return None
    return PlannedJob(name, make, config, schedule, first)


def default_state_dir(path: str) -> str:
    """Return the folder of state of one configuration file, by its real path."""
    import hashlib
    real = os.path.realpath(path)
    base = os.environ.get('XDG_STATE_HOME') or os.path.expanduser('~/.local/state')
    mark = hashlib.sha256(real.encode('utf-8', 'surrogateescape')).hexdigest()[:8]
    return os.path.join(base, 'torque', f'{os.path.basename(real)}-{mark}')


config_ini = Config()
BUILT_IN = {f'torque:{name}': job for name, job in list(globals().items())
            if isinstance(job, type) and issubclass(job, Job) and job is not Job}


# --- Command line ----------------------------------------------------------------------------
# Arguments enter, an exit status leaves. Here alone are signals, the log's form and the
# end of the process. Signal handlers only put a function into the scheduler's mail.

INI_PLACES = ('torque.ini', '$XDG_CONFIG_HOME/torque/torque.ini', '~/.pyroscope/torque.ini')


class LogFormat(logging.Formatter):
    """A line a record: control characters in a message are escaped, tracebacks follow below."""

    def __init__(self, with_time: bool):
        super().__init__(('%(asctime)s ' if with_time else '') + '%(levelname)s %(job)s: %(text)s',
                         '%Y-%m-%d %H:%M:%S')

    def format(self, record: logging.LogRecord) -> str:
        record.job = record.name.partition('.')[2] or record.name
        record.text = one_line(record.getMessage())
        return super().format(record)

    def formatException(self, ei: Any) -> str:
        return super().formatException(ei).translate({**CONTROL, 10: '\n'})


def stderr_is_journal() -> bool:
    """Tell whether systemd's journal reads stderr: it names device and inode of the stream."""
    try:
        stream = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get('JOURNAL_STREAM') == f'{stream.st_dev}:{stream.st_ino}'


def set_up_log(level: int, log_file: str | None) -> None:
    """Send the log to stderr, or to a file; systemd's journal adds the time itself."""
    logging.raiseExceptions = False             # a closed stderr must not end anything
    if log_file:
        try:
            handler: logging.Handler = logging.FileHandler(os.path.expanduser(log_file),
                                                           encoding='utf-8')
        except OSError as error:
            raise UserError(f'--log-file {log_file}: {error.strerror}') from None
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(LogFormat(bool(log_file) or not stderr_is_journal()))
    root = logging.getLogger('torque')
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level)


def find_ini() -> str:
    """Return the first configuration file that exists in the usual places."""
    places = [os.path.expanduser(os.path.expandvars(place)) for place in INI_PLACES]
    if not os.environ.get('XDG_CONFIG_HOME'):
        places[1] = os.path.expanduser('~/.config/torque/torque.ini')
    for place in places:
        if os.path.isfile(place):
            return place
    raise UserError(f"no configuration: there is no {', '.join(places)}. To begin, copy "
                    'torque.ini.example to torque.ini, set scgi_url in it to where your '
                    'rTorrent answers, and start `python3 torque.py -c torque.ini`')


def make_tasks(config: Config, jobs: dict[str, Any]) -> list[Task]:
    """Return a task for each planned job."""
    tasks = []
    for planned in config.jobs:
        log = logging.getLogger('torque.' + planned.name)
        if planned.config.log_level:
            log.setLevel(planned.config.log_level.upper())
        tasks.append(Task(planned.name, planned.schedule, jobs[planned.name].run,
                          planned.config.max_runtime, log))
    return tasks


def clean_up(name: str, job: Any) -> None:
    """Call a job's cleanup(), whatever comes of it."""
    try:
        getattr(job, 'cleanup', lambda: None)()
    except BaseException as error:
        logging.getLogger('torque.' + name).error('cleanup failed: %s', origin(error))


def run_daemon(config: Config) -> int:
    """Run jobs on schedule until SIGTERM or SIGINT."""
    import signal
    log = logging.getLogger('torque.main')
    jobs = config.make_jobs()
    scheduler = Scheduler()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: scheduler.mail.put(scheduler.stop))
    for task in make_tasks(config, jobs):
        scheduler.add(task)
    log.info('started with %d jobs: %s', len(jobs), ', '.join(sorted(jobs)) or 'none is active')
    scheduler.serve()
    running = scheduler.running()
    if running:
        log.info('stopping; %s may run for %g s more', ', '.join(task.name for task in running),
                 config.torque.grace)
    hung = {task.name for task in scheduler.finish(config.torque.grace)}
    for name, job in jobs.items():
        if name not in hung:
            clean_up(name, job)
    log.info('stopped%s', f"; still running: {', '.join(sorted(hung))}" if hung else '')
    if hung:                                    # Python would wait for nothing, but may crash
        logging.shutdown()
        os._exit(EXIT_OK)
    return EXIT_OK


def run_once(config: Config) -> int:
    """Run the one planned job now, in the foreground."""
    import signal
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    planned, = config.jobs
    job = config.make_jobs()[planned.name]
    task = make_tasks(config, {planned.name: job})[0]
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
    config.make_jobs()
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
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for engine in dict.fromkeys([config.engine, *(job.config.engine for job in config.jobs)]):
        try:
            engine.open()
            print(f"{engine.address.where}: rTorrent {'/'.join(engine.versions)} answers")
        except RpcError as error:
            if not error.told:
                logging.getLogger('torque.engine').warning('%s', error)
    print(f'{config.path}: no mistakes')
    return EXIT_OK


def list_jobs() -> int:
    """Print the built-in jobs and their options."""
    def show(option: Option) -> None:
        print(f'    {option.name:<18} {option.kind:<7} {option.help}'
              + (f' [{option.default}]' if option.default != '' else ''))
    for name, job in BUILT_IN.items():
        print(f"{name}\n    {(job.__doc__ or '').splitlines()[0]}")
        for option in job.options or ():
            show(option)
        print()
    print('any job')
    for option in CORE_OPTIONS:
        show(option)
    print('\n[TORQUE]')
    for option in TORQUE_OPTIONS:
        show(option)
    return EXIT_OK


def parse_arguments(words: list[str] | None) -> Any:
    """Return the command line's options."""
    import argparse
    parser = argparse.ArgumentParser(
        prog='torque', description='Run jobs on a schedule beside rTorrent.',
        epilog='Exit status: 0 fine, 1 a job failed, 2 usage, 78 configuration.')
    option = parser.add_argument
    option('-c', '--config', metavar='FILE',
           help='configuration; left out: torque.ini, ~/.config/torque/torque.ini, '
                '~/.pyroscope/torque.ini')
    option('-n', '--dry-run', action='store_true', help='change nothing, only say what would be')
    option('-D', dest='define', metavar='KEY=VALUE', action='append', default=[],
           help='set a key of [TORQUE], or section.KEY, over the file')
    option('-v', '--verbose', action='store_true', help='log more of what jobs do')
    option('-q', '--quiet', action='store_true', help='log only warnings and errors')
    option('--debug', action='store_true', help='log everything, with the traceback of any failure')
    option('--log-file', metavar='FILE', help='log to a file instead of stderr')
    option('--run-once', metavar='JOB', help='run one job now, active or not, and exit')
    option('--check', action='store_true', help='check the configuration, show what would run')
    option('--list-jobs', action='store_true', help='show built-in jobs and their options')
    option('--version', action='version', version=f'torque {VERSION}')
    return parser.parse_args(words)


def load(arguments: Any) -> None:
    """Load the configuration, and log what is noteworthy in it even when it is refused."""
    log = logging.getLogger('torque.config')
    config_ini.warnings, config_ini.notes = [], []
    try:
        config_ini.load(arguments.config or find_ini(), arguments.define, arguments.dry_run,
                        arguments.run_once)
    finally:
        for text in config_ini.warnings:
            log.warning('%s', text)
        for text in config_ini.notes:
            log.info('%s', text)


def main(words: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    sys.modules['torque'] = sys.modules[__name__]       # what a job module imports is this one
    arguments = parse_arguments(words)
    level = TRACE if arguments.debug else logging.DEBUG if arguments.verbose else \
        logging.WARNING if arguments.quiet else logging.INFO
    try:
        set_up_log(level, arguments.log_file)
        if arguments.list_jobs:
            return list_jobs()
        load(arguments)
        if arguments.check:
            return check(config_ini)
        return run_once(config_ini) if arguments.run_once else run_daemon(config_ini)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UnknownJob) else EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_FAILED
    except BrokenPipeError:                             # as with `--list-jobs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_OK


if __name__ == '__main__':
    sys.exit(main())
