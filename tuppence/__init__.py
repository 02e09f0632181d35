"""tuppence trains GPTs to a budget."""

import time

__version__ = "0.1.0"
STARTED = time.time()  # the process's start, as near as Python can tell (host.process_start)
