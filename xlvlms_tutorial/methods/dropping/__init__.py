"""Leave image tokens out: behind a layer of the decoder (FastV, ToMe), or before it by pooling.

What is left out is neither computed nor kept in the cache, so the work is really saved.
"""

from xlvlms_tutorial.methods.dropping.dropping import Kept, drop_tokens
from xlvlms_tutorial.methods.dropping.merging import merge_tokens
from xlvlms_tutorial.methods.dropping.pooling import pool_tokens

__all__ = ["Kept", "drop_tokens", "merge_tokens", "pool_tokens"]
