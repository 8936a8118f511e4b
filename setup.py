"""Everything static is in pyproject.toml; this file is where native extensions are declared once there are any."""

from setuptools import setup

setup()
