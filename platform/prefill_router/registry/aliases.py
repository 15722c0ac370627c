"""Aliases of the registered model: which version has which role.

In: version numbers. Out: the aliases in the registry. `champion` serves; `previous` is the champion before it, which
`undo` restores; `candidate` and `shadow` are versions on trial (docs/promoting.md). `promote` and `undo` alone set the
first two, so that an undo always finds the champion before. Knows nothing of gates. Functions raise UnavailableError
within seconds if the store does not answer.
"""

from __future__ import annotations

from prefill_router.errors import InputError
from prefill_router.registry.store import NAME, connect, failures
from prefill_router.registry.versions import Version, by_alias, find_version

CHAMPION = "champion"
PREVIOUS = "previous"
CANDIDATE = "candidate"
SHADOW = "shadow"
TRIAL = (CANDIDATE, SHADOW)  # set and removed freely


def promote(number: int) -> Version | None:
    """Makes version `number` the champion. The old champion becomes `previous` and is returned.

    If the version is the champion already, nothing changes and the present `previous` is returned. Raises InputError
    for an unknown version.
    """
    client = connect()
    with failures():
        find_version(client, str(number))
        champion = by_alias(client, CHAMPION)
        if champion is not None and champion.number == number:
            return by_alias(client, PREVIOUS)
        # `previous` first: if the process dies between the calls, the old champion stays and its number is not lost.
        if champion is not None:
            client.set_registered_model_alias(NAME, PREVIOUS, str(champion.number))
        client.set_registered_model_alias(NAME, CHAMPION, str(number))
        return champion


def undo() -> tuple[Version, Version | None]:
    """Swaps `champion` and `previous`; returns the new (champion, previous).

    Raises InputError if `previous` is not set or is the champion.
    """
    client = connect()
    with failures():
        champion, previous = by_alias(client, CHAMPION), by_alias(client, PREVIOUS)
        if previous is None or (champion is not None and champion.number == previous.number):
            raise InputError(
                f"undo: nothing to undo, `{PREVIOUS}` "
                f"{'is not set' if previous is None else 'is the champion itself'}; "
                "choose a version with --version"
            )
        # The champion first, since an undo is urgent.
        client.set_registered_model_alias(NAME, CHAMPION, str(previous.number))
        if champion is not None:
            client.set_registered_model_alias(NAME, PREVIOUS, str(champion.number))
        return previous, champion


def aliases() -> dict[str, int]:
    """The version number of every alias that is set; empty if nothing is registered."""
    from mlflow.exceptions import MlflowException

    client = connect()
    with failures():
        try:
            found = client.get_registered_model(NAME).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}
    return {alias: int(number) for alias, number in sorted(found.items())}


def set_alias(alias: str, number: int) -> int | None:
    """Gives `candidate` or `shadow` to version `number`; returns the number of the version that had it before.

    Raises InputError for another alias or an unknown version.
    """
    _check(alias)
    client = connect()
    with failures():
        find_version(client, str(number))
        before = by_alias(client, alias)
        client.set_registered_model_alias(NAME, alias, str(number))
    return None if before is None else before.number


def remove_alias(alias: str) -> int | None:
    """Removes `candidate` or `shadow`; returns the number of the version that had it, None if it was not set.

    Raises InputError for another alias.
    """
    _check(alias)
    client = connect()
    with failures():
        before = by_alias(client, alias)
        if before is not None:
            client.delete_registered_model_alias(NAME, alias)
    return None if before is None else before.number


def _check(alias: str) -> None:
    if alias not in TRIAL:
        raise InputError(
            f"alias: got {alias!r}, allowed are {' and '.join(TRIAL)}; `{CHAMPION}` and `{PREVIOUS}` are set by "
            "promoting and undoing alone"
        )
