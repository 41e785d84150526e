"""`python -m ampdeploy`."""

from ampdeploy.cli import entry

entry()
