"""Downloads into the Hugging Face cache: repositories through huggingface_hub, and single files of plain addresses.

`cache_dir`, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub. A
file of a plain address is kept in `miniclip-files/` of the same folder. It has its name once all of it is there and its
size and sha256 are right; until then it is NAME.incomplete, which the next call continues."""

import hashlib
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from glob import escape
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock

from miniclip.utils.errors import InputError, first_line, shorten
from miniclip.utils.files import delete, sha256, sync
from miniclip.utils.weight_files import SHARD, find_weights, weight_names

CONFIGS = {"config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json", "manifest.json"}
TRIES, WAIT, TIMEOUT = 5, 1.0, 30.0  # in a row without a byte; seconds before the second try, doubled; of silence
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model"}  # of SigLIP
COMMIT = re.compile(r"[0-9a-f]{40}")
CONTENT = re.compile(r"[0-9a-f]{64}")  # the hub names large files by their sha256
logger = logging.getLogger(__name__)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns the folder that downloads are kept in."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser()


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, also if that was after huggingface_hub was imported."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES


def chosen(names: Iterable[str], repo: str) -> tuple[list[str], list[str]]:
    """Returns the files of a repository that a model needs: configs and a tokenizer; and the weights in one form, with
    OpenCLIP's first where its config is, and safetensors before torch's. Raises InputError if there are no weights."""
    names = set(names)
    known = names & CONFIGS | {name for name in names if re.fullmatch(r"tokenizer/(\d+/)?[\w-][\w.-]*", name)}
    if "merges.txt" not in names:  # CLIP's own, which is here
        known |= names & TOKENIZER
    for weights in weight_names("open_clip_config.json" in names):
        if weights in names:
            return sorted(known), [weights]
        if shards := {name for name in names if (part := SHARD.fullmatch(name)) and part[1] + part[3] == weights}:
            return sorted(known), sorted(shards | names & {weights + ".index.json"})
    listed = ", ".join(weight_names(False))
    raise InputError(f"the repository {repo} has no weights named {listed}, but {shorten(sorted(names))}")


def check_repo(repo: str):
    """Raises InputError for what cannot be the name of a repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(f"{repo!r} is not the name of a repository: write org/name") from None


def download_repo(repo: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Returns the folder of a model repository (`org/name`) in the cache, with the files that a model needs, downloaded
    if they are not there or not the newest. Without a connection a cached copy is taken, with a warning. `revision` is
    a branch, a tag or a commit. Raises InputError, naming the repository and what to do, if it cannot be had."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    cache = cache_folder(cache_dir)
    check_repo(repo)

    def cached(name: str, revision: str | None = revision) -> str | None:
        path = try_to_load_from_cache(repo, name, cache, revision)
        return path if isinstance(path, str) else None

    def copy() -> Path | None:
        found = [path for name in (*CONFIGS, *weight_names(False)) if (path := cached(name))]
        return Path(found[0]).parent if found else None

    if COMMIT.fullmatch(revision or "") and (folder := copy()) and find_weights(folder) != folder:
        return folder  # a commit does not change
    try:
        if not offline():
            info = HfApi().model_info(repo, revision=revision)
            # Weights come last: where they are, also after an interruption, the rest is.
            for names in chosen((file.rfilename for file in info.siblings or ()), repo):
                new = [name for name in names if not cached(name, info.sha)]
                patterns = list(map(escape, names))
                folder = Path(snapshot_download(repo, revision=revision, cache_dir=cache, allow_patterns=patterns))
                for name in new:
                    check_content(folder / name, repo)
            return folder
        problem = "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or copy the cache from another machine"
    except InputError:
        raise
    except Exception as error:  # of huggingface_hub, and of whichever HTTP library it uses
        if not (problem := explain(error, repo, revision)):
            raise
    if (folder := copy()) is None or find_weights(folder) == folder:
        state = "no copy of it" if folder is None else "a copy without its weights"
        at = f" at revision {revision}" if revision else ""
        raise InputError(f"repository {repo}{at}: {problem} (the cache {cache} has {state})")
    if not offline():
        logger.warning("%s is taken from the cache: %s", repo, problem)
    return folder


def explain(error: Exception, repo: str, revision: str | None) -> str:
    """Returns what went wrong with a repository and how to go on; "" for an error that is none of the hub's."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    token = "set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: ask for access at {hub}/{repo}, then {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no such repository, or it is private: check the name, or {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub}/{repo} has no branch, tag or commit {revision!r}"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, FileNotFoundError):
        return f"a file is missing there ({first_line(error)}): try again, or tell its owner"
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", "an error")
        return f"{hub} answered {status}" + (f": {token}" if status in (401, 403) else ": try again later")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return ""  # of this machine: a full disk, a folder that is not writable
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, OSError) or library.startswith(("httpx", "httpcore", "requests", "urllib3")):
        return f"{hub} cannot be reached ({first_line(error)}): check the network, or set HF_ENDPOINT to a mirror"
    return ""


def check_content(path: Path, repo: str):
    """Raises InputError, and removes a file, if its content is not what the hub says that it is."""
    blob = path.resolve()
    if CONTENT.fullmatch(blob.name) and (digest := sha256(blob)) != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        wrong = f"its sha256 is {digest[:16]}..., not {blob.name[:16]}..."
        raise InputError(f"{path.name} of {repo} is not what the hub announced ({wrong}), and was deleted: try again")


def download_url(url: str, digest: str = "", size: int | None = None, cache_dir: str | Path | None = None) -> Path:
    """Returns a file of a plain address in the cache, downloaded unless it is there. `digest` is its sha256, or the
    first digits of it, `size` its bytes, as far as they are published. An interrupted download is continued, if the
    server can and its file is the same. Raises InputError, naming the address, if it cannot be had or is another."""
    parts = urlsplit(url)
    name = re.sub(r"[^\w.-]", "_", Path(parts.path).name).lstrip(".")
    if parts.scheme not in ("http", "https") or not name:
        raise InputError(f"{url} is not the http or https address of a file")
    folder = cache_folder(cache_dir) / "miniclip-files" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    if path.is_file():
        return path
    if offline():
        raise InputError(f"{url} is not in the cache ({folder}), and HF_HUB_OFFLINE is set: unset it to download")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # another process may be downloading the same
        if path.is_file():
            return path
        partial = path.with_name(f"{name}.incomplete")
        fetch(url, partial, size)
        if not (found := sha256(partial)).startswith(digest.lower()):
            forget(partial)
            wrong = f"its sha256 is {found[:16]}..., not {digest[:16]}..."
            raise InputError(f"{url} is not the published file ({wrong}), and was deleted: try again, or elsewhere")
        sync(partial)
        os.replace(partial, path)
        forget(partial)
        sync(folder)
    return path


def version_file(partial: Path) -> Path:  # says which version of the server's file an incomplete one is of
    return partial.with_name(f"{partial.name}.etag")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def forget(partial: Path):
    """Deletes what there is of an incomplete file."""
    delete(partial)
    delete(version_file(partial))


def fetch(url: str, partial: Path, size: int | None = None):
    """Downloads a file, going on behind what an earlier call or try left. Raises InputError if that is impossible."""
    from huggingface_hub.utils import tqdm  # which HF_HUB_DISABLE_PROGRESS_BARS silences

    failures, problem = 0, None
    with tqdm(desc=partial.stem, unit="B", unit_scale=True, unit_divisor=1024, total=size) as bar:
        while failures < TRIES:
            if failures:
                time.sleep(WAIT * 2 ** (failures - 1))
            before = size_of(partial)
            try:
                total = receive(url, partial, bar)
                if total is None or size_of(partial) >= total:
                    break
                problem = "the connection ended early"
            except urllib.error.HTTPError as error:
                if error.code == 416:  # nothing comes after what is there: it belongs to another file
                    forget(partial)
                elif error.code not in (408, 429, 500, 502, 503, 504):
                    raise InputError(f"{url} cannot be downloaded: the server answered {error.code}") from None
                problem = f"the server answered {error.code}"
            except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
                problem = first_line(error)
            failures = 1 if size_of(partial) > before else failures + 1
        else:
            kept = f"; {now} bytes are kept, and the next try continues there" if (now := size_of(partial)) else ""
            raise InputError(f"{url} cannot be downloaded ({problem}): check the network and try again{kept}")
    if size is not None and (found := size_of(partial)) != size:
        forget(partial)
        wrong = f"it has {found} bytes, not {size}"
        raise InputError(f"{url} is not the published file: {wrong}. It was deleted: try again")


def receive(url: str, partial: Path, bar) -> int | None:
    """Appends what one request brings, from the start if the server has another version. Returns the file's size."""
    start = size_of(partial)
    known = version_file(partial).read_text(encoding="utf-8") if version_file(partial).is_file() else ""
    headers = {"User-Agent": "miniclip", "Accept-Encoding": "identity"}
    if start and known:  # without a version nobody knows that both halves are of one file
        headers |= {"Range": f"bytes={start}-", "If-Range": known}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        etag = response.headers.get("ETag", "")
        version = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        if response.status != 206 or span is None or int(span[1]) != start or version not in ("", known):
            if response.status == 206:  # of another file, or another part: ask for all of it
                forget(partial)
                raise ConnectionError("the file on the server has changed")
            start = 0
            version_file(partial).write_text(version, encoding="utf-8")
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        bar.total, bar.n = total, start
        bar.refresh()
        with open(partial, "ab" if start else "wb") as file:
            while piece := response.read(1 << 18):
                file.write(piece)
                bar.update(len(piece))
    return total
