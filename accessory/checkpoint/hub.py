"""Fetch from the Hugging Face Hub the files that one layout needs: `hf://owner/name[/folder][@revision]`.

A repository often holds several copies of one model (safetensors and pickles, an original and a converted folder). Only
one copy is fetched. huggingface_hub resumes, caches and authorises.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from accessory.checkpoint.model_files import RESOURCES, Wanted, files_to_load, holds_weights, is_plain
from accessory.config import read_json
from accessory.errors import CheckpointError, MissingExtraError, listed

SPELLING = "hf://owner/name[/folder][@revision]"

_TIMEOUT = 15.0  # seconds until the Hub counts as out of reach
_AWAY = "the Hub cannot be reached and"
_NOTHING = ["<none>"]  # a pattern that no file name can match


@dataclass(frozen=True)
class Address:
    """The parts of an hf:// address. `folder` is "" for the repository's top, `revision` None for its main branch."""

    url: str
    repo: str
    folder: str
    revision: str | None

    def path(self, name: str) -> str:
        """The path of a file of this folder within the repository."""
        return f"{self.folder}/{name}" if self.folder else name


def is_remote(path: str | Path) -> bool:
    """Whether `path` is an hf:// address. hf:/ counts too, because `pathlib` merges the two slashes."""
    return str(path).startswith(("hf://", "hf:/"))


def parse(path: str | Path, revision: str | None = None) -> Address:
    """Split an hf:// address. The revision comes at the end or, as huggingface_hub spells it, after the name.

    Raises CheckpointError if the address is malformed or names another revision than `revision`.
    """
    url = "hf://" + str(path).split(":", 1)[1].lstrip("/")
    head, at, tail = url[len("hf://") :].partition("@")
    parts = head.rstrip("/").split("/")
    if at and len(parts) == 2:
        match = re.fullmatch(r"(refs/(?:pr|convert)/[^/]+|[^/]+)(?:/(.*))?", tail)
        tail, rest = (match[1], match[2]) if match else ("", None)
        parts += rest.rstrip("/").split("/") if rest else []
    if len(parts) < 2:
        raise CheckpointError(f"{url}: not a repository's address, which is spelled {SPELLING}")
    if at and not tail:
        raise CheckpointError(f"{url}: no revision after the @; leave both out for the main branch")
    for part in parts[:2]:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", part) or part in (".", ".."):
            raise CheckpointError(f"{url}: {part!r} cannot be an owner's or a repository's name; spell it {SPELLING}")
    for part in parts[2:]:
        if part in ("", ".", ".."):
            raise CheckpointError(f"{url}: {part!r} cannot be part of a folder's name; spell it {SPELLING}")
    if tail and revision and tail != revision:
        raise CheckpointError(f"{url}: names revision {tail!r}, but revision {revision!r} was asked for as well")
    return Address(url, "/".join(parts[:2]), "/".join(parts[2:]), tail or revision)


def check_there(path: str | Path) -> None:
    """CheckpointError for a local path that does not exist."""
    if not is_remote(path) and not Path(path).exists():
        raise CheckpointError(f"{path}: no such file or folder (a repository on the Hub is spelled {SPELLING})")


def resolve(
    path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    wanted: Wanted | None = None,
) -> Path:
    """Return the local folder (or .gguf file) of `path`, after fetching it if `path` is an hf:// address.

    A local path is returned as it is. `wanted` selects tensors by name, so that fewer files are fetched; see
    `files_to_load`. `cache_dir` replaces huggingface_hub's default cache. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are
    honoured. Without a network, the cached files are used if they are complete.

    Raises CheckpointError if there is no such path, repository, revision or folder, or no checkpoint in it, and
    MissingExtraError without huggingface_hub.
    """
    check_there(path)
    if not is_remote(path):
        return Path(path)
    address = parse(path, revision)
    hub = _open(address, cache_dir, progress)
    names = hub.names()
    if names is None:
        return hub.from_cache(wanted)
    if address.folder in names and address.folder.endswith(".gguf"):
        return hub.fetch([address.folder]) / PurePosixPath(address.folder).name
    elsewhere = _folders_with_checkpoints(names)
    chosen = files_to_load(_children(names, address), hub.read_index, address.url, elsewhere, wanted)
    folder = hub.fetch([address.path(name) for name in chosen])
    return _folder_or_gguf(folder, chosen)


def fetch_configuration(path: str | Path) -> list[Path]:
    """Fetch only the configuration files of an hf:// address; return their paths, the one with most precedence last.

    Raises as `resolve` does, and CheckpointError for a folder without configuration files.
    """
    folder, there = _fetch_some(path, ("params.json", "config.json"))
    if not there:
        raise CheckpointError(
            f"{parse(path).url}: has no config.json or params.json, only its weights would tell its sizes"
        )
    return [folder / name for name in there]


def fetch_resources(path: str | Path) -> Path:
    """Fetch all that accompanies the weights of an hf:// address (tokenizer, configuration); return their folder.

    Raises as `resolve` does, and CheckpointError for a folder without such files.
    """
    folder, there = _fetch_some(path, sorted(RESOURCES))
    if not there:
        raise CheckpointError(f"{parse(path).url}: has neither a tokenizer nor a configuration")
    return folder


def _fetch_some(path: str | Path, wanted: Sequence[str]) -> tuple[Path, list[str]]:
    """(folder, names): the local folder of an hf:// address, and which of the `wanted` files it has, fetched."""
    address = parse(path)
    hub = _open(address, cache_dir=None, progress=False)
    names = hub.names()
    if names is None:
        folder = hub.cached_folder()
        cached = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return folder, [name for name in wanted if name in cached]
    there = [name for name in wanted if name in _children(names, address)]
    return (hub.fetch([address.path(name) for name in there]) if there else Path()), there


def _open(address: Address, cache_dir: str | Path | None, progress: bool) -> _Hub:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingExtraError(
            f"{address.url}: reading from the Hub needs huggingface_hub: pip install 'mixtral-accessory[hub]'"
        ) from error
    return _Hub(huggingface_hub, address, cache_dir, progress)


class _Hub:
    """Calls huggingface_hub for one address, and turns its exceptions into one-line errors."""

    def __init__(self, module: Any, address: Address, cache_dir: str | Path | None, progress: bool) -> None:
        self.module, self.address = module, address
        # The environment is read now, not when huggingface_hub happens to be imported.
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        self.common: dict[str, Any] = {
            "repo_id": address.repo,
            "revision": address.revision,
            "cache_dir": cache_dir,
            "endpoint": self.endpoint,
        }
        if not progress:
            self.common["tqdm_class"] = _silent_tqdm()

    def names(self) -> list[str] | None:
        """The names of all files in the repository; None if the Hub cannot be reached."""
        if self.module.constants.HF_HUB_OFFLINE:
            return None
        api = self.module.HfApi(endpoint=self.endpoint)
        try:
            with self.explained():
                # Without a network this fails at once, while the listing would retry for half a minute.
                commit = api.model_info(self.address.repo, revision=self.address.revision, timeout=_TIMEOUT).sha
                return list(api.list_repo_files(self.address.repo, revision=commit))
        except _UnreachableError:
            return None

    def read_index(self, name: str) -> Mapping[str, Any]:
        return read_json(self.fetch([self.address.path(name)]) / name)

    def fetch(self, names: Sequence[str]) -> Path:
        """Download these files and return the folder that holds them. CheckpointError if one did not arrive."""
        with self.explained():
            # allow_patterns takes glob patterns, so brackets and stars in names must be escaped.
            root = self._snapshot([glob.escape(name) for name in names])
        for name in names:
            if not (root / name).is_file():
                raise CheckpointError(f"{self.address.url}: {name} did not arrive; try again")
        return (root / names[0]).parent

    def _snapshot(self, patterns: list[str]) -> Path:
        """Call snapshot_download, and up to twice more if the connection breaks; it keeps what has arrived."""
        errors = self.module.errors
        for last in (False, False, True):
            try:
                return Path(self.module.snapshot_download(allow_patterns=patterns, **self.common))
            except errors.HTTPError as error:
                if last or isinstance(error, errors.HfHubHTTPError):
                    raise
        raise AssertionError("unreachable")

    def cached_folder(self) -> Path:
        """The folder of earlier downloads, complete or not. CheckpointError if there were none."""
        try:
            # A pattern that matches no file: otherwise huggingface_hub treats a partial download as a failure.
            root = Path(self.module.snapshot_download(local_files_only=True, allow_patterns=_NOTHING, **self.common))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.address.url}: {_AWAY} nothing of it is in the cache (is HF_HUB_OFFLINE set?)"
            ) from error
        return root / self.address.folder

    def from_cache(self, wanted: Wanted | None = None) -> Path:
        """The folder of earlier downloads. CheckpointError if it lacks files that are needed."""
        missing = f"{self.address.url}: {_AWAY}"
        folder = self.cached_folder()
        if self.address.folder.endswith(".gguf") and folder.is_file():
            return folder
        if not folder.is_dir():
            raise CheckpointError(f"{missing} the cache holds no folder {self.address.folder!r} of it")
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        try:
            chosen = files_to_load(names, lambda name: read_json(folder / name), self.address.url, wanted=wanted)
        except CheckpointError as error:
            raise CheckpointError(f"{missing} the cache holds only part of it ({error})") from error
        return _folder_or_gguf(folder, chosen)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn exceptions of huggingface_hub into one-line errors; _UnreachableError if the Hub did not answer."""
        errors, url, repo = self.module.errors, self.address.url, self.address.repo
        try:
            yield
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{url}: {repo} is gated: accept its terms on its page, then `hf auth login` or set HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{url}: no model repository {repo} (a private one needs `hf auth login` or HF_TOKEN)"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{url}: {repo} has no revision {self.address.revision!r}") from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise CheckpointError(
                    f"{url}: access denied (HTTP {status}); `hf auth login` or set HF_TOKEN"
                ) from error
            raise CheckpointError(f"{url}: the Hub answered with HTTP {status}; try again later") from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
            raise _UnreachableError(f"{url}: the Hub cannot be reached ({_first_line(error)})") from error
        except errors.HTTPError as error:  # the HTTP client's base class: refused, timed out, cut off
            raise _UnreachableError(f"{url}: the Hub cannot be reached ({_first_line(error)})") from error
        except OSError as error:
            raise CheckpointError(f"{url}: the download failed ({_first_line(error)})") from error


class _UnreachableError(CheckpointError):
    pass


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _silent_tqdm() -> type:
    from tqdm.auto import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _children(names: Sequence[str], address: Address) -> list[str]:
    """The files directly in the address's folder; CheckpointError if the repository has no such folder."""
    prefix = address.folder + "/" if address.folder else ""
    below = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    if not below:
        if address.folder in names:
            raise CheckpointError(f"{address.url}: {address.folder} is a file; give its folder, or a .gguf file")
        folders = sorted({str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."})
        there = "its folders are " + listed(folders, 8) if folders else "it has no folders"
        raise CheckpointError(f"{address.url}: {address.repo} has no folder {address.folder!r}; {there}")
    return [name for name in below if is_plain(name)]


def _folder_or_gguf(folder: Path, chosen: Sequence[str]) -> Path:
    gguf = [name for name in chosen if name.endswith(".gguf")]
    return folder / gguf[0] if gguf else folder


def _folders_with_checkpoints(names: Sequence[str]) -> list[str]:
    split = [name.rpartition("/") for name in names]
    return sorted({folder for folder, _, file in split if folder and holds_weights(file)})
