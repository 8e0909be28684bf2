"""`python -m vicreg_jepa`: the command `vicreg-jepa`."""

from vicreg_jepa.cli import main

raise SystemExit(main())
