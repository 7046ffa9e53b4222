"""What has to be right on the Hub before hours of work: rights, visibility, whose, the tag."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi, get_token

from ..export.model_files import can_change, is_written
from .client import (
    MAIN,
    HubError,
    RemoteState,
    check_ours,
    explained,
    model_files,
    remote_state,
    with_retries,
)

_NO_TAG = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[/.-]|[/.]$|/\.|\.lock(/|$)|^@$"
)
"""What git refuses in the name of a tag."""


def check_access(
    api: HfApi,
    repo_id: str,
    base: str,
    *,
    tag: str | None,
    private: bool = False,
    create_pr: bool = False,
    force: bool = False,
    new: bool = False,
) -> RemoteState | None:
    """Refuse what the Hub, or we, would refuse at the end.

    Args:
        base: that the model was refined from.
        tag: that will mark the commit; None in a pull request.
        private: nothing of it may be public.
        create_pr: it will be proposed, which needs no right to write there.
        force: replace what another hand made.
        new: what will be published is not there yet, so the tag must mark nothing; else it
            may mark the newest commit, which may hold it.

    Returns:
        The repository; None where it has to be made.

    Raises:
        HubError: not logged in; a token that may not write there; a public repository where
            a private one is asked for; a model that is not ours or of another base; files
            beside it that a loader would take; a tag that git refuses, that marks another
            commit, or that is the name of a branch.
    """
    if tag is not None:
        check_tag(tag)
    if (api.token or get_token()) is None:
        raise HubError(
            "Not logged in to the Hub: run 'hf auth login', or set HF_TOKEN."
        )
    account = explained(lambda: with_retries(api.whoami), repo_id)
    _check_token(account, repo_id)
    state = explained(lambda: remote_state(api, repo_id), repo_id)
    if state is None:
        if create_pr:
            raise HubError(
                f"{repo_id} does not exist: push it without --create-pr first."
            )
        _check_namespace(account, repo_id)
        return None
    if not create_pr:
        explained(
            lambda: with_retries(lambda: api.auth_check(repo_id, write=True)), repo_id
        )
    if not (force or create_pr):
        check_ours(repo_id, state, base)
    check_private(repo_id, state, private)
    if not force:
        _check_beside(repo_id, state)
    if tag is not None:
        head = None if new else state.head
        explained(lambda: check_free(api, repo_id, tag, head), repo_id)
    return state


def check_tag(tag: str) -> None:
    """Refuse a name that git takes for no tag.

    Raises:
        HubError: says so.
    """
    if not tag or _NO_TAG.search(tag):
        raise HubError(f"tag is {tag!r}, which git refuses: name another, such as v2.")


def check_private(repo_id: str, state: RemoteState, private: bool) -> None:
    """Refuse to put what is private into a public repository.

    Raises:
        HubError: says so.
    """
    if private and not state.private:
        raise HubError(
            f"{repo_id} is public, and a private one is asked for: make it private in its "
            "settings on the Hub, name another, or leave --private (hub_private_repo) out."
        )


def check_free(api: HfApi, repo_id: str, tag: str, head: str | None) -> None:
    """Refuse a tag that marks another commit than `head`, or names a branch.

    Raises:
        HubError: says which.
    """
    refs = with_retries(lambda: api.list_repo_refs(repo_id))
    if tag in {MAIN, *(branch.name for branch in refs.branches)}:
        raise HubError(f"tag is {tag!r}, the name of a branch of {repo_id}.")
    tagged = {found.name: found.target_commit for found in refs.tags}.get(tag)
    if tagged not in (None, head):
        raise tag_taken(repo_id, tag, str(tagged))


def tag_taken(repo_id: str, tag: str, commit: str) -> HubError:
    """What to say of a tag that marks something else."""
    return HubError(
        f"The tag {tag} of {repo_id} marks another commit ({commit[:7]}): name another "
        "one with --tag."
    )


def strange_files(state: RemoteState) -> list[str]:
    """Files of another hand that a loader may take, or run, in place of ours."""
    return [n for n in model_files(state) if can_change(n) and not is_written(n)]


def _check_beside(repo_id: str, state: RemoteState) -> None:
    strange = strange_files(state)
    if strange:
        more = f" and {len(strange) - 4} more" if len(strange) > 4 else ""
        raise HubError(
            f"{repo_id} holds files that unirefiner did not write and that may be loaded or "
            f"run with the model ({', '.join(strange[:4])}{more}): delete them on the Hub, "
            "name another repository, or let --force remove them in the same commit."
        )


def _check_token(account: Mapping[str, Any], repo_id: str) -> None:
    """Refuse a token that reads only; one with single rights is judged by the Hub."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            f"This token may not write to {repo_id}: it is {account.get('name')}'s, for "
            "reading. Make one with write access, then run 'hf auth login' or set HF_TOKEN."
        )


def _check_namespace(account: Mapping[str, Any], repo_id: str) -> None:
    """Refuse to make a repository under a name that is not the token's owner's."""
    owner = repo_id.partition("/")[0]
    name = str(account.get("name"))
    groups = {
        str(group.get("name")): group.get("roleInOrg")
        for group in account.get("orgs") or ()
    }
    if owner != name and owner not in groups:
        raise HubError(
            f"This token may not write to {owner}/: it is {name}'s. Name {name}/"
            f"{repo_id.partition('/')[2]}, or use a token of {owner}."
        )
    if groups.get(owner) == "read":
        raise HubError(
            f"{name} may not write to {owner}/, only read: ask for the right, or name "
            f"{name}/{repo_id.partition('/')[2]}."
        )
