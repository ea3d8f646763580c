"""What a user should know of an import or an export that went well."""

from __future__ import annotations

__all__ = ["ExchangeWarning"]


class ExchangeWarning(UserWarning):
    """Something was not taken over, is new, or could not be checked; the message says it in one line."""
