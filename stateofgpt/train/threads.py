"""How the threads of a process wait for work.

Owns one setting of GNU OpenMP's, which is read when torch is imported. Knows nothing of torch, and must not import it.
"""

from __future__ import annotations

import os

LOOKS = "300"  # GNU OpenMP's own default is 300,000


def wait_briefly() -> None:
    """Let a thread look for work only briefly before it sleeps; call it before torch is imported.

    With the default a waiting thread holds its core for milliseconds: beside other work a training step then takes two
    to three times as long, alone it is the same. What the user's environment says of it is left as it is.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", LOOKS)
