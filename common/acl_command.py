"""`torchrelay acl`: an access control file for the queue's server, with a user for each role."""

from __future__ import annotations

import hashlib
import re
import secrets
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from common.acl import REPLICA_COMMANDS, Role, acl_file_line

_MIN_PASSWORD_CHARS: Final = 12
_PREFIX: Final = re.compile(r"[A-Za-z0-9_.-]{0,64}")
# Without this the server's own user may do everything, and needs no password.
_NO_DEFAULT_USER: Final = "user default reset off"


def acl(
    roles: Annotated[list[Role] | None, typer.Argument(help="Roles; all if none is given.", show_default=False)] = None,
    password_file: Annotated[
        list[str] | None,
        typer.Option("--password-file", help="ROLE=FILE with the role's password; else one is made and shown once."),
    ] = None,
    prefix: Annotated[str, typer.Option("--prefix", help="In front of the users' names, which are the roles.")] = "",
    replicas: Annotated[
        bool, typer.Option("--replicas", help="Gateways wait for replicas: WAIT and WAITAOF (Valkey, Redis 7.2) too.")
    ] = False,
    keep_default: Annotated[bool, typer.Option("--keep-default", help="Leave the user `default` as it is.")] = False,
) -> None:
    """Print lines for the server's `aclfile`: a user for each role, with exactly the commands and keys that it needs.

    The lines hold digests only. Passwords that are made are shown on stderr.
    """
    if _PREFIX.fullmatch(prefix) is None:
        raise typer.BadParameter("takes letters, digits, '_', '.' and '-'", param_hint="--prefix")
    chosen = list(dict.fromkeys(roles or Role))
    given = _read_passwords(password_file or [], chosen)
    lines = [] if keep_default else [_NO_DEFAULT_USER]
    made = {role: secrets.token_urlsafe(32) for role in chosen if role not in given}
    for role in chosen:
        digest = hashlib.sha256((given | made)[role].encode()).hexdigest()
        extra = REPLICA_COMMANDS if replicas and role is Role.GATEWAY else ()
        lines.append(acl_file_line(role, prefix + role.value, digest, extra))
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    for role, password in made.items():
        sys.stderr.write(f"password of {prefix}{role.value}: {password}\n")


def _read_passwords(files: list[str], roles: list[Role]) -> dict[Role, str]:
    """Passwords by role. Raises BadParameter."""
    found: dict[Role, str] = {}
    for entry in files:
        name, equals, path = entry.partition("=")
        if not equals or name not in [role.value for role in roles] or Role(name) in found:
            raise typer.BadParameter("takes ROLE=FILE, each role once", param_hint="--password-file")
        try:
            password = Path(path).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError):
            raise typer.BadParameter(f"{path} cannot be read", param_hint="--password-file") from None
        if len(password) < _MIN_PASSWORD_CHARS or not password.isprintable():
            message = f"{path} must hold at least {_MIN_PASSWORD_CHARS} printable characters in one line"
            raise typer.BadParameter(message, param_hint="--password-file")
        found[Role(name)] = password
    return found
