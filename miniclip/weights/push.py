"""Uploads of a model to the Hugging Face hub, in files that MiniCLIP, OpenCLIP and transformers load.

What is uploaded is made anew from the model: nothing of a run's folder (paths, locks, checkpoints, optimizer states)
goes along, except that the card tells what run.json and the results there say."""

import re
import shutil
import tempfile
import warnings
from pathlib import Path

from miniclip.model import MiniClip
from miniclip.utils.errors import CheckpointError, InputError, first_line
from miniclip.utils.files import MANIFEST, write_json, write_text
from miniclip.utils.weight_files import read_json
from miniclip.weights.card import MARK, write_card
from miniclip.weights.convert import EXPORTERS
from miniclip.weights.hub import check_repo, explain

LICENSES = "mit, apache-2.0, bsd-3-clause, cc-by-4.0, cc-by-sa-4.0, cc-by-nc-4.0, cc0-1.0, openrail, other"
# Files that an upload may write, and that an earlier one of another model may have left.
OURS = re.compile(
    r"(tokenizer/.+|(config|tokenizer|tokenizer_config|vocab|special_tokens_map|preprocessor_config|processor_config"
    r"|open_clip_config|manifest)\.json|merges\.txt|(model|open_clip_model)\.safetensors|image_processing_\w+\.py)"
)


def push_to_hub(
    model: MiniClip, repo_id: str, license: str | None, private: bool | None, token: str | bool | None,
    revision: str | None, run: str | Path | None, commit_message: str,
) -> str:  # fmt: skip
    """Uploads a model to `repo_id` ("org/name") and returns the address of the commit. See `MiniClip.push_to_hub`."""
    check_license(license)
    if run and not Path(run).is_dir():
        raise InputError(f"run {run} is not a folder: name the output folder of the model's training")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_repo(repo_id)
    with tempfile.TemporaryDirectory(prefix="miniclip-push-") as scratch:
        folder = Path(scratch, "files")
        notes = write_files(folder, model)
        write_text(folder / "README.md", write_card(model, repo_id, license, notes, run and Path(run)))
        api = HfApi(token=token)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            there = set(api.list_repo_files(repo, revision=revision))
            names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            if "README.md" in there:
                kept = Path(api.hf_hub_download(repo, "README.md", revision=revision, local_dir=Path(scratch, "old")))
                if MARK not in kept.read_text(encoding="utf-8", errors="replace"):
                    names.discard("README.md")
                    warnings.warn(f"{repo} has a model card of its own, which is kept", stacklevel=3)
            # One commit: whatever breaks, the repository is as it was.
            changes = [CommitOperationAdd(name, folder / name) for name in sorted(names)]
            changes += [CommitOperationDelete(name) for name in sorted(filter(OURS.fullmatch, there - names))]
            return api.create_commit(repo, changes, commit_message=commit_message, revision=revision).commit_url
        except Exception as error:  # of huggingface_hub, and of whichever HTTP library it uses
            if problem := explain_upload(error, repo_id, revision):
                raise InputError(f"{repo_id} was not uploaded: {problem}") from error
            raise


def check_license(license: str | None):
    """Raises InputError, listing the usual ones, without a licence."""
    if not license:
        raise InputError(f"a licence is missing (--license): name the one you give the weights, usually {LICENSES}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise InputError(f"{license!r} is not a licence's name on the hub. Usual are {LICENSES}")


def write_files(folder: Path, model: MiniClip) -> dict[str, list[str] | str]:
    """Writes a model in the forms of the libraries that can hold it, each weight file once: MiniCLIP reads OpenCLIP's,
    whose config gets what OpenCLIP skips. Returns what each library's form cannot hold, or why there is none."""
    folder.mkdir()
    notes = {"miniclip": []} | {form: write_form(folder, form, model) for form in ("openclip", "hf")}
    config = folder / "open_clip_config.json"
    if isinstance(notes["openclip"], str):  # then transformers' form cannot hold it either
        write_form(folder, "miniclip", model)
    else:
        write_json(config, read_json(config) | {"preprocess_cfg": model.config.to_dict()["preprocess_cfg"]})
    return notes


def write_form(folder: Path, form: str, model: MiniClip) -> list[str] | str:
    scratch = folder.with_name(form)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            EXPORTERS[form](scratch, model)
        except CheckpointError as error:
            return str(error)
    if form != "miniclip":
        (scratch / MANIFEST).unlink(missing_ok=True)  # of one form alone; the hub has a sha256 of each large file
    for part in scratch.iterdir():
        shutil.move(part, folder / part.name)
    return [str(warning.message) for warning in caught]


def explain_upload(error: Exception, repo: str, revision: str | None) -> str:
    """What went wrong with an upload and what to do; "" for an error that is not the hub's."""
    from huggingface_hub import constants, errors

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of one file of several
    if isinstance(error, ValueError) and "README" in str(error):
        return f"{constants.ENDPOINT} refuses the card: {' '.join(str(error).split())}"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.HfHubHTTPError) and status:
        token = f"a token that may write to {repo.partition('/')[0]} is needed: set HF_TOKEN, or run `hf auth login`"
        fix = {401: token, 403: token}.get(status, f"try again later ({first_line(cause)})")
        return f"{constants.ENDPOINT} answered {status}, and nothing there was changed: {fix}"
    return explain(cause, repo, revision)
