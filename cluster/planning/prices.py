"""What a run costs in money, at prices that the user gives: none is known to this program."""

from __future__ import annotations

from dataclasses import dataclass

HOUR, MONTH_HOURS = 3600, 730
GB = 1e9


@dataclass(frozen=True)
class Prices:
    """In one currency; None: not given, and then not counted.

    Attributes:
        gpu_hour: of a GPU for an hour.
        gb_month: of storing 10^9 bytes for a month.
        thousand_gets: of 1,000 GET requests.
        gb_transfer: of fetching 10^9 bytes from the storage.
    """

    gpu_hour: float | None = None
    gb_month: float | None = None
    thousand_gets: float | None = None
    gb_transfer: float | None = None


def count_money(
    prices: Prices,
    *,
    gpu_hours: float,
    stored_bytes: float,
    months: float,
    requests: float,
    fetched_bytes: float,
) -> dict[str, float]:
    """Money by what it is for, of the prices that are given."""
    amounts = {
        "GPUs": (prices.gpu_hour, gpu_hours),
        "storage": (prices.gb_month, stored_bytes / GB * months),
        "requests": (prices.thousand_gets, requests / 1000),
        "transfer": (prices.gb_transfer, fetched_bytes / GB),
    }
    return {name: price * amount for name, (price, amount) in amounts.items() if price is not None}
