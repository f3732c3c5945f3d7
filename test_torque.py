#!/usr/bin/env python3
"""Tests of torque: `python3 test_torque.py`, or `python3 test_torque.py bench`."""
import unittest

import torque  # noqa: F401

if __name__ == '__main__':
    unittest.main()
