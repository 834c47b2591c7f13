"""The model that runs in the page ``book/live``: its kernels, its pack of weights, its check.

The page's own files are in ``live/`` beside ``tools/``; this package makes what they load.
"""

from tools import ROOT

SOURCE = ROOT / "live"
