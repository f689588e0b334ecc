"""`hf://owner/name[/folder][@revision]`: the files that one layout needs, fetched from the Hugging Face Hub.

A repository often holds one model several times over (safetensors beside pickles, a converted folder beside the
original): only one copy is fetched. Resuming, caching and authorisation are huggingface_hub's.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from accessory.config import read_json
from accessory.errors import CheckpointError, MissingExtraError

SPELLING = "hf://owner/name[/folder][@revision]"

# What comes along with the weights, whichever layout they are in.
RESOURCES = frozenset(
    [
        "config.json",
        "params.json",
        "meta.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "tokenizer.model.v1",
        "tokenizer.model.v2",
        "tokenizer.model.v3",
        "tekken.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
    ]
)
_INDEXES = ("model.safetensors.index.json", "consolidated.safetensors.index.json", "pytorch_model.bin.index.json")
_TIMEOUT = 15.0  # seconds until the Hub counts as out of reach
_AWAY = "the Hub cannot be reached and"
_NOTHING = ["<none>"]  # a pattern that no file name can match

ReadIndex = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Address:
    """What an hf:// address says; `folder` is "" for the top of the repository, `revision` None for its main branch."""

    url: str
    repo: str
    folder: str
    revision: str | None

    def path(self, name: str) -> str:
        """A file of the folder as the repository names it."""
        return f"{self.folder}/{name}" if self.folder else name


def is_remote(path: str | Path) -> bool:
    """Whether `path` is an hf:// address (also one whose two slashes `pathlib` has made one), not a local path."""
    return str(path).startswith(("hf://", "hf:/"))


def parse(path: str | Path, revision: str | None = None) -> Address:
    """Take an hf:// address apart; the revision may stand at its end or, as huggingface_hub spells it, after the name.

    Raises CheckpointError where the address is malformed or names another revision than `revision`.
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


def resolve(
    path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    any_name: bool = False,
) -> Path:
    """The local folder (or .gguf file) that `path` stands for, fetched first where it is an hf:// address.

    A local path is returned as it is. any_name: weights may be called otherwise than a checkpoint's, as open_clip's
    are. `cache_dir` is huggingface_hub's (by default its own); HF_ENDPOINT, HF_TOKEN
    and HF_HUB_OFFLINE are honoured; without a network, what is in the cache serves if it is whole.

    Raises CheckpointError where there is no such path, repository, revision or folder, or no checkpoint in it, and
    MissingExtraError without huggingface_hub.
    """
    if not is_remote(path):
        local = Path(path)
        if not local.exists():
            raise CheckpointError(f"{path}: no such file or folder (a repository on the Hub is spelled {SPELLING})")
        return local
    address = parse(path, revision)
    hub = _open(address, cache_dir, progress)
    names = hub.names()
    if names is None:
        return hub.from_cache(any_name)
    if address.folder in names and address.folder.endswith(".gguf"):
        return hub.fetch([address.folder]) / PurePosixPath(address.folder).name
    elsewhere = _folders_with_checkpoints(names)
    chosen = choose(_children(names, address), hub.read_index, address.url, elsewhere, any_name)
    folder = hub.fetch([address.path(name) for name in chosen])
    return _folder_or_gguf(folder, chosen)


def fetch_configuration(path: str | Path, *, cache_dir: str | Path | None = None) -> list[Path]:
    """The configuration files of an hf:// address, later ones more telling; nothing else is fetched.

    Raises as `resolve` does, and CheckpointError for a folder that has none.
    """
    address = parse(path)
    hub = _open(address, cache_dir, progress=False)
    names = hub.names()
    if names is None:
        folder = hub.cached_folder()
        there = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    else:
        there = _children(names, address)
    wanted = [name for name in ("params.json", "config.json") if name in there]
    if not wanted:
        raise CheckpointError(
            f"{address.url}: has no config.json or params.json, only its weights would tell its sizes"
        )
    if names is not None:
        folder = hub.fetch([address.path(name) for name in wanted])
    return [folder / name for name in wanted]


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
    """huggingface_hub's calls for one address, with its errors said in one line."""

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
        """Every file of the repository; None where the Hub cannot be reached."""
        if self.module.constants.HF_HUB_OFFLINE:
            return None
        api = self.module.HfApi(endpoint=self.endpoint)
        try:
            with self.explained():
                # Asked first because it gives up at once; the listing would be tried again for half a minute.
                commit = api.model_info(self.address.repo, revision=self.address.revision, timeout=_TIMEOUT).sha
                return list(api.list_repo_files(self.address.repo, revision=commit))
        except _UnreachableError:
            return None

    def read_index(self, name: str) -> Mapping[str, Any]:
        return read_json(self.fetch([self.address.path(name)]) / name)

    def fetch(self, names: Sequence[str]) -> Path:
        """Download these files; the folder they lie in."""
        with self.explained():
            # Patterns, so a name with brackets or stars in it has to be escaped.
            root = self._snapshot([glob.escape(name) for name in names])
        for name in names:
            if not (root / name).is_file():
                raise CheckpointError(f"{self.address.url}: {name} did not arrive; try again")
        return (root / names[0]).parent

    def _snapshot(self, patterns: list[str]) -> Path:
        """snapshot_download, called again where a connection broke off: what has arrived by then is kept."""
        errors = self.module.errors
        for last in (False, False, True):
            try:
                return Path(self.module.snapshot_download(allow_patterns=patterns, **self.common))
            except errors.HTTPError as error:
                if last or isinstance(error, errors.HfHubHTTPError):
                    raise
        raise AssertionError("unreachable")

    def cached_folder(self) -> Path:
        """Where earlier downloads lie, whatever they left."""
        try:
            # Nothing is asked for by name: huggingface_hub would take a partial download of other files for a failure.
            root = Path(self.module.snapshot_download(local_files_only=True, allow_patterns=_NOTHING, **self.common))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.address.url}: {_AWAY} nothing of it is in the cache (is HF_HUB_OFFLINE set?)"
            ) from error
        return root / self.address.folder

    def from_cache(self, any_name: bool = False) -> Path:
        """The folder as earlier downloads left it, if it is whole."""
        missing = f"{self.address.url}: {_AWAY}"
        folder = self.cached_folder()
        if self.address.folder.endswith(".gguf") and folder.is_file():
            return folder
        if not folder.is_dir():
            raise CheckpointError(f"{missing} the cache holds no folder {self.address.folder!r} of it")
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
        try:
            chosen = choose(names, lambda name: read_json(folder / name), self.address.url, any_name=any_name)
        except CheckpointError as error:
            raise CheckpointError(f"{missing} the cache holds only part of it ({error})") from error
        return _folder_or_gguf(folder, chosen)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what huggingface_hub raises into one line; _UnreachableError where there was no answer at all."""
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
    """The files that lie in the address' folder itself; CheckpointError where the repository has no such folder."""
    prefix = address.folder + "/" if address.folder else ""
    below = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    if not below:
        if address.folder in names:
            raise CheckpointError(f"{address.url}: {address.folder} is a file; give its folder, or a .gguf file")
        folders = sorted({str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."})
        there = "its folders are " + _some(folders) if folders else "it has no folders"
        raise CheckpointError(f"{address.url}: {address.repo} has no folder {address.folder!r}; {there}")
    return [name for name in below if _is_plain(name)]


def _is_plain(name: str) -> bool:
    """A file's own name, which cannot lead out of its folder."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0:")


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _folder_or_gguf(folder: Path, chosen: Sequence[str]) -> Path:
    gguf = [name for name in chosen if name.endswith(".gguf")]
    return folder / gguf[0] if gguf else folder


def _folders_with_checkpoints(names: Sequence[str]) -> list[str]:
    weights = re.compile(r"(.+)/(consolidated[^/]*|model[^/]*\.safetensors|pytorch_model[^/]*\.bin|[^/]+\.gguf)")
    return sorted({match[1] for name in names if (match := weights.fullmatch(name))})


def choose(
    names: Sequence[str],
    read_index: ReadIndex,
    origin: str,
    elsewhere: Sequence[str] = (),
    any_name: bool = False,
) -> list[str]:
    """Of a folder's file names, those that one layout needs: weights, index, configuration, tokenizer.

    Safetensors win over pickles, and an accessory folder over a Hugging Face one over an official or torrent one over
    a GGUF file. `read_index` gives the contents of an index; `elsewhere` are folders to suggest where this one holds
    no checkpoint; with `any_name`, a single file of weights will do, whatever it is called. Raises CheckpointError for
    none, for one with shards missing, and where several .gguf files leave it open which is meant.
    """
    weights = _weights(sorted(names), read_index, origin) or (only_weights(names) if any_name else [])
    if not weights:
        hint = (
            f"; folders that hold one: {_some(elsewhere)}"
            if elsewhere
            else f"; it has {_some(sorted(names)) or 'none'}"
        )
        raise CheckpointError(f"{origin}: no checkpoint among the files of this folder{hint}")
    return weights + sorted(RESOURCES & set(names))


def _weights(names: list[str], read_index: ReadIndex, origin: str) -> list[str]:
    present = set(names)
    accessory = [r"consolidated\.(?P<rank>\d+)-of-(?P<count>\d+)\.model\." + ext for ext in ("safetensors", "pth")]
    rules: list[Callable[[], list[str]]] = [
        *(lambda rule=rule: _numbered(names, rule, origin) for rule in accessory),
        lambda: _indexed(present, _INDEXES[0], read_index, origin),
        lambda: _one(present, "model.safetensors"),
        lambda: _numbered(names, r"model-(?P<rank>\d+)-of-(?P<count>\d+)\.safetensors", origin, first=1),
        lambda: _one(present, "consolidated.safetensors"),
        lambda: _indexed(present, _INDEXES[1], read_index, origin),
        lambda: _numbered(names, r"consolidated\.(?P<rank>\d+)\.pth", origin),
        lambda: _numbered(names, r"consolidated\.(?P<rank>\d+)\.pt", origin),
        lambda: _numbered(names, r"consolidated\.00\.pth-split(?P<rank>\d+)", origin),
        lambda: _indexed(present, _INDEXES[2], read_index, origin),
        lambda: _one(present, "pytorch_model.bin"),
        lambda: _only_gguf(names, origin),
    ]
    return next((found for rule in rules if (found := rule())), [])


def only_weights(names: Sequence[str]) -> list[str]:
    """The one file of weights under a name that no layout knows; where there are several forms, the safetensors."""
    for ends in ((".safetensors",), (".bin", ".pt", ".pth")):
        if len(found := [name for name in names if name.endswith(ends)]) == 1:
            return found
    return []


def _one(present: set[str], name: str) -> list[str]:
    return [name] if name in present else []


def _numbered(names: list[str], rule: str, origin: str, first: int = 0) -> list[str]:
    """The files whose numbers run without a gap from `first`, up to the count their names give."""
    groups: dict[int | None, dict[int, str]] = {}
    for name in names:
        if match := re.fullmatch(rule, name):
            count = match.groupdict().get("count")
            groups.setdefault(int(count) if count else None, {})[int(match["rank"])] = name
    problem = ""
    for count, files in sorted(groups.items(), key=lambda item: item[0] or 0):
        wanted = range(first, first + (count or max(files) + 1 - first))
        if not (missing := [rank for rank in wanted if rank not in files]):
            return [files[rank] for rank in wanted]
        problem = f"{origin}: of {next(iter(files.values()))} and its like, numbers {missing} are missing"
    if problem:
        raise CheckpointError(problem)
    return []


def _indexed(present: set[str], index: str, read_index: ReadIndex, origin: str) -> list[str]:
    if index not in present:
        return []
    weight_map = read_index(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{origin}: {index} has no weight_map from tensors to files")
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not _is_plain(name) or name not in present]:
        raise CheckpointError(f"{origin}: {index} names files that are not in its folder: {_some(missing)}")
    return [*files, index]


def _only_gguf(names: list[str], origin: str) -> list[str]:
    found = [name for name in names if name.endswith(".gguf")]
    if len(found) > 1:
        raise CheckpointError(f"{origin}: several .gguf files, name one of them: {_some(found)}")
    return found
