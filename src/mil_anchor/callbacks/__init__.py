"""Lightning callbacks: the plug-ins, the mechanism they share, and the attention monitor."""

import logging

# As Lightning does: what is found is said, also where nobody has set up logging.
_logger = logging.getLogger(__name__)
_logger.setLevel(logging.INFO)
if not logging.getLogger().hasHandlers():
    _logger.addHandler(logging.StreamHandler())
    _logger.propagate = False
