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

import bisect
import functools
import heapq
import json
import logging
import os
import queue
import random
import re
import shlex
import socket
import sys
import threading
import time
from collections import namedtuple
from datetime import date, datetime, timedelta
from itertools import count as counter
from typing import Any, Callable, Iterable, Iterator, NamedTuple

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
    words = re.findall(r'(\d+(?:\.\d+)?)\s*([wdhms]?)\s*', str(text).strip().lower())
    rest = re.sub(r'\d+(?:\.\d+)?\s*[wdhms]?\s*', '', str(text).strip().lower())
    units = [unit for _, unit in words]
    if rest or not words or ('' in units and len(units) > 1) or len(set(units)) < len(units):
        raise UserError(f'{text!r} is not a length of time; allowed are e.g. 15s 5m 1h30m 2d')
    return sum(float(number) * DURATION_UNITS[unit or 's'] for number, unit in words)


def parse_size(text: Any) -> int:
    """Return the bytes in a size; units are powers of 1024.

    >>> parse_size('1.5k'), parse_size('4G')
    (1536, 4294967296)
    """
    match = re.fullmatch(r'(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?', str(text).strip().lower())
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
CRON_FIELDS = (FIELDS['minute'], FIELDS['hour'], FIELDS['day'], FIELDS['month'], CRON_WEEKDAY)
CRON_NAMES = {'@hourly': '0 * * * *', '@daily': '0 0 * * *', '@midnight': '0 0 * * *',
              '@weekly': '0 0 * * 0', '@monthly': '0 0 1 * *', '@yearly': '0 0 1 1 *',
              '@annually': '0 0 1 1 *'}


def parse_field(text: str, field: Field) -> frozenset[int]:
    """Return the numbers that a field allows.

    part ::= ('*' | value | value '-' value) ['/' step];  field ::= part (',' part)*

    >>> sorted(parse_field('0-20/10,30', FIELDS['minute']))
    [0, 10, 20, 30]
    """
    allowed: set[int] = set()
    for part in text.split(','):
        match = re.fullmatch(r'\s*(?:(\*)|(\w+)(?:-(\w+))?)(?:/(\d+))?\s*', part)
        if not match:
            raise UserError(f'{field.name} {part!r} is not understood; '
                            'allowed are * */n a a-b a-b/n and lists of these')
        star, first, last, step = match.groups()
        low = field.low if star else field_value(first, field)
        high = field_value(last, field) if last else field.high if star or step else low
        if last and last.lower() == 'sun' and field is CRON_WEEKDAY and high < low:
            high = 7                                # sat-sun
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
    if word.lower() in field.names:
        return field.names.index(word.lower()) + field.base
    if not re.fullmatch('[0-9]{1,4}', word) or not field.low <= int(word) <= field.high:
        also = f' or {field.names[0]} ... {field.names[-1]}' if field.names else ''
        raise UserError(f'{field.name} {word!r} is not in {field.low}-{field.high}{also}')
    return int(word)


def days_in_month(year: int, month: int) -> int:
    """Return the length of a month in days."""
    return 31 if month == 12 else (date(year, month + 1, 1) - date(year, month, 1)).days


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

    fields: allowed numbers by FIELDS name. special: days such as ('last', None), ('3rd', 6).
    either: day and day_of_week are alternatives (cron), where both are restricted.
    every_hour: the hour is `*`, so due times follow real time through clock changes. Else they
    keep to the wall: what a change skips is one run right after the gap, what comes twice
    runs the first time.
    """

    def __init__(self, fields: dict, special: Iterable = (), either: bool = False,
                 every_hour: bool = True, zone: Any = None):
        self.years, self.months = fields['year'], sorted(fields['month'])
        self.first_year = min(self.years)
        self.monthdays, self.weeks = fields['day'], fields['week']
        self.weekdays, self.special = fields['day_of_week'], tuple(special)
        self.either = either
        self.hours, self.minutes, self.seconds = (
            self.successors(fields[name], FIELDS[name].high) for name in
            ('hour', 'minute', 'second'))
        self.every_hour = every_hour
        self.step_back = 60 if every_hour else 3 * 3600
        self.zone = zone
        self.days = functools.lru_cache(64)(self.matching_days)

    @staticmethod
    def successors(allowed: frozenset[int], high: int) -> list:
        """Return a table: at [n] the smallest allowed number that is n or more, else None."""
        table: list = [None] * (high + 2)
        for number in range(high, -1, -1):
            table[number] = number if number in allowed else table[number + 1]
        return table

    def matching_days(self, year: int, month: int) -> list[int]:
        """Return the days of one month that are allowed, in order."""
        if year not in self.years or month not in self.months:
            return []
        first, length = date(year, month, 1), days_in_month(year, month)
        positions = set()
        for position, weekday in self.special:
            if weekday is None:
                positions.add(length)
                continue
            start = (weekday - first.weekday()) % 7 + 1
            if position == 'last':
                positions.add(start + (length - start) // 7 * 7)
            else:
                positions.add(start + 7 * POSITIONS.index(position))
        found = []
        week, last_week = (date(year, month, day).isocalendar()[1] for day in (1, length))
        if week <= last_week and not any(n in self.weeks for n in range(week, last_week + 1)):
            return []
        for day in range(1, length + 1):
            weekday = (first.weekday() + day - 1) % 7
            if weekday == 0:
                week = date(year, month, day).isocalendar()[1]
            by_day, by_weekday = day in self.monthdays or day in positions, weekday in self.weekdays
            if ((by_day or by_weekday) if self.either else (by_day and by_weekday)) and (
                    week in self.weeks):
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
        wall = self.wall(start)
        if wall.fold:                               # go to where the repetition ends
            change = self.change(self.unix(wall.replace(fold=0)), start)
            wall = max(wall.replace(fold=0), self.wall(change - 1) + SECOND)
        found = self.wall_from(wall)
        if found is None:
            return None
        seconds = self.unix(found)
        if self.wall(seconds) == found:
            return seconds
        return self.change(self.unix(found.replace(fold=1)), seconds)       # skipped


class Croniter(Calendar):
    """A cron expression beyond torque's grammar, as the croniter package reads it."""

    def __init__(self, text: str, zone: Any = None):
        import croniter
        self.text, self.zone, self.croniter = text, zone, croniter.croniter
        self.every_hour = text.split()[1] == '*'
        self.step_back = 60 if self.every_hour else 3 * 3600
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
        raise UserError(f'timezone {name!r} needs Python 3.9 or newer; '
                        'leave it out for local time') from None
    except (KeyError, ValueError, OSError):
        raise UserError(f'timezone {name!r} is not known on this machine; allowed are names '
                        'such as Europe/Berlin, where time zone data is installed') from None


def parse_schedule(text: str) -> Schedule:
    """Return the Schedule that a text spells: an interval, fields, or cron.

    schedule ::= (interval | fields | cron) ['jitter=' duration] ['timezone=' Area/City]

    >>> parse_schedule('every 1h30m').next(0), parse_schedule('*/5 * * * *').next(60)
    (5400.0, 300)
    """
    try:
        words = shlex.split(str(text))
    except ValueError as error:
        raise UserError(f'schedule {text!r}: {error}') from None
    fields, options, plain = {}, {}, []
    for word in words:
        name, equals, value = word.partition('=')
        if not equals:
            plain.append(word)
            continue
        place = options if name in ('jitter', 'timezone') else fields
        if place is fields and name not in FIELDS:
            raise UserError(f'schedule field {name!r} is not known; allowed are '
                            f"{' '.join(FIELDS)} jitter timezone{nearest(name, FIELDS)}")
        if name in place:
            raise UserError(f'schedule field {name!r} is given twice')
        place[name] = value
    if bool(fields) == bool(plain):
        raise UserError(f'schedule {text!r} is not understood; allowed are an interval '
                        '(every 15s), fields (hour=*/2 minute=5) or cron (*/5 * * * *)')
    zone = parse_zone(options['timezone']) if 'timezone' in options else None
    schedule = calendar_from_fields(fields, zone) if fields else parse_plain(plain, zone)
    if 'jitter' in options:
        schedule.jitter = parse_duration(options['jitter'])
    if schedule.next(0) is None:
        raise UserError(f'schedule {text!r} can never fire: there is no such date')
    return schedule


def parse_plain(words: list[str], zone: Any) -> Schedule:
    """Return the Schedule of an interval or a cron expression, split into words."""
    text = ' '.join(words)
    if text.lower() in CRON_NAMES:
        text = CRON_NAMES[text.lower()]
        words = text.split()
    elif words[0].lower() == 'every' or len(words) == 1:
        length = ' '.join(words[1:]) if words[0].lower() == 'every' else text
        seconds = parse_duration(length)
        if seconds < 0.1:
            raise UserError(f'interval {length!r} is too short; at least 0.1s is allowed')
        if zone:
            raise UserError('timezone= means nothing to an interval; leave it out')
        return Interval(seconds)
    if len(words) in (6, 7) or len(words) == 5 and re.search(r'[LlWw#?]', re.sub(
            '|'.join(WEEKDAYS + MONTHS), '', text.lower())):
        try:
            return Croniter(text, zone)
        except ImportError:
            raise UserError(f'{text!r} needs croniter, which is not installed; without it cron '
                            'has five fields of * */n a a-b a-b/n and names') from None
    if len(words) != 5:
        raise UserError(f'{text!r} has {len(words)} words; cron has five fields: '
                        'minute hour day month weekday')
    minute, hour, day, month, weekday = (
        parse_field(word, field) for word, field in zip(words, CRON_FIELDS))
    star_day, star_weekday = '*' in words[2].split(','), '*' in words[4].split(',')
    return Calendar({
        'year': range(1970, 10000), 'month': month, 'day': day, 'week': range(54),
        'day_of_week': {(number + 6) % 7 for number in weekday},
        'hour': hour, 'minute': minute, 'second': {0}},
        either=not star_day and not star_weekday, every_hour=words[1] == '*', zone=zone)


def calendar_from_fields(texts: dict, zone: Any) -> Calendar:
    """Return the Calendar of NAME=VALUE fields; parts left out follow APScheduler's rule."""
    finest = max(list(FIELDS).index(name) for name in texts)
    fields, special = {}, []
    for index, (name, field) in enumerate(FIELDS.items()):
        text = texts.get(name)
        if text is None:
            always = index < finest or name in ('week', 'day_of_week')
            fields[name] = range(field.low, field.high + 1) if always else {field.low}
            continue
        parts = text.split(',')
        if name == 'day':
            special = [found for found in map(parse_position, parts) if found]
            parts = [part for part in parts if not parse_position(part)]
        fields[name] = parse_field(','.join(parts), field) if parts else frozenset()
    return Calendar(fields, special, zone=zone,
                    every_hour='hour' not in texts and finest > 5 or texts.get('hour') == '*')


def parse_position(text: str) -> tuple | None:
    """Return ('last', None) for `last`, ('3rd', 6) for `3rd sun`, None for other days.

    >>> parse_position('3rd sun'), parse_position('15')
    (('3rd', 6), None)
    """
    words = text.lower().split()
    if words == ['last']:
        return 'last', None
    if len(words) == 2 and words[0] in POSITIONS:
        return words[0], field_value(words[1], FIELDS['day_of_week'])
    return None
