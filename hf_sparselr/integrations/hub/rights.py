"""Checks, before the work, that this user may push to a repository."""

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

_WRITING_ROLES = ("admin", "write", "contributor")


def check_push_rights(repo_id: str) -> None:
    """Checks that the logged-in user may push to a repository, as far as the Hub tells without a change there.

    Args:
        repo_id: "name" or "namespace/name".

    Raises:
        OSError: nobody is logged in, the token can only read, or the namespace is another's; naming `push`.
        ValueError: not the name of a repository.
    """
    validate_repo_id(repo_id)
    user = HfApi().whoami()
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PermissionError(f"push={repo_id!r}: expected a token that may write, but the one in use may only read")
    namespace = repo_id.partition("/")[0] if "/" in repo_id else user["name"]
    if role == "fineGrained" or namespace == user["name"]:
        return  # such a token need not show the user's organisations
    writable = [org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg") in _WRITING_ROLES]
    if namespace not in writable:
        raise PermissionError(
            f"push={repo_id!r}: expected a repository of {' or '.join([user['name'], *writable])}, where this user may "
            "write"
        )
