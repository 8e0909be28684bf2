"""`python -m jepa`: the command `jepa`."""

from jepa.cli import main

raise SystemExit(main())
