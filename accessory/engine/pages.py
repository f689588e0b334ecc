"""The pages of the key/value cache: who holds which, and which have content that another sequence can use.

A page holds the keys and values of `limits.PAGE_SIZE` tokens, in all layers. Full pages are published under a digest of
all tokens up to their end, so sequences that begin alike share them. A page that nobody holds keeps its content until
another sequence needs the room; the least recently used one goes first.

Only the standard library is imported here.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

Digest = bytes


class PagePool:
    """Pages 1 … `pages` - 1. No sequence gets page 0: padding rows of CUDA graphs write there."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._held = [0] * pages  # how many sequences hold each page
        self._blank = bytearray(b"\0" + b"\1" * (pages - 1))  # 1: nobody holds the page, and it has no content
        self._blanks = pages - 1
        self._content: dict[int, Digest] = {}  # of published pages
        self._published: dict[Digest, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # published and held by nobody, least recently used first

    @property
    def free(self) -> int:
        """The pages that `take` can give."""
        return self._blanks + len(self._unused)

    def take(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` pages for one more holder, or None where fewer are free. They have no content that counts.

        after: the page before them in their sequence. Pages lie side by side where they can: a CPU then reads them as
        one tensor.
        """
        if count > self.free:
            return None
        pages: list[int] = []
        first = self._run(count, after)
        if first is not None:
            pages = list(range(first, first + count))
        else:
            at = 0
            while len(pages) < count and (at := self._blank.find(1, at)) >= 0:
                pages.append(at)
                at += 1
            while len(pages) < count:
                pages.append(self._evict())
        for page in pages:
            self._blanks -= self._blank[page]
            self._blank[page] = 0
            self._held[page] = 1
        return pages

    def _run(self, count: int, after: int | None) -> int | None:
        """The first of `count` blank pages in a row, those behind page `after` if they are."""
        run = b"\1" * count
        if after is not None and self._blank.startswith(run, after + 1):
            return after + 1
        at = self._blank.find(run)
        return at if at >= 0 else None

    def _evict(self) -> int:
        page, _ = self._unused.popitem(last=False)
        del self._published[self._content.pop(page)]
        return page

    def share(self, digests: Iterable[Digest]) -> list[int]:
        """The pages with the longest beginning of `digests` as content, for one more holder of each."""
        pages = []
        for digest in digests:
            page = self._published.get(digest)
            if page is None:
                break
            self._unused.pop(page, None)
            self._held[page] += 1
            pages.append(page)
        return pages

    def publish(self, page: int, digest: Digest) -> None:
        """Let later sequences share a page that its holder has filled."""
        if digest not in self._published and page not in self._content:
            self._published[digest] = page
            self._content[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """A sequence holds these pages no more. Its last ones are forgotten first: fewer sequences share them."""
        for page in reversed(pages):
            self._held[page] -= 1
            if self._held[page]:
                continue
            if page in self._content:
                self._unused[page] = None
            else:
                self._blank[page] = 1
                self._blanks += 1

    def forget(self) -> None:
        """Drop all published content, for example because the pages' memory is new."""
        for page in self._unused:
            self._blank[page] = 1
        self._blanks += len(self._unused)
        for table in (self._unused, self._content, self._published):
            table.clear()


def chain(before: Digest, ids: Sequence[int], seen: Iterable[bytes] = ()) -> Digest:
    """The digest of a page: of its token ids, of the images in it (`seen`), and of all that comes before it."""
    digest = blake2b(before, digest_size=16)
    digest.update(array("q", ids).tobytes())
    for content in seen:
        digest.update(content)
    return digest.digest()
