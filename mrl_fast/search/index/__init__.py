"""The index: vectors by id, in memory or mapped from files, searched exactly or by stages."""

from mrl_fast.search.index.index import MatryoshkaIndex

__all__ = ["MatryoshkaIndex"]
