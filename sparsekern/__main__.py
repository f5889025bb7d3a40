"""`python -m sparsekern` is the command `sparsekern`."""

import sys

from .cli.main import main

sys.exit(main())
