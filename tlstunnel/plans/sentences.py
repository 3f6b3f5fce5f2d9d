"""Why a site stands where it does, in one plain sentence of English, from its figures.

The sentences speak of guidelines, which nobody has to keep to.
"""

from collections.abc import Callable, Mapping

from tlstunnel.config.usage import Usage
from tlstunnel.plans.values import Figures, Flood, Resource, Scarcity, Standing

_RESOURCES: Mapping[Resource, str] = {
    "tunnels": "tunnels",
    "handshakes": "handshakes",
    "bytes": "bytes",
    "cpu": "CPU time",
}
_SCARCITIES: Mapping[Scarcity, str] = {"cpu": "CPU", "descriptors": "descriptors", "memory": "memory"}
_FLOODS: Mapping[Flood, str] = {
    "refused": "handshakes are refused",
    "short": "tunnels end as soon as they have begun",
    "unfinished": "connections send no request",
}


def describe(standing: Standing, figures: Figures, usage: Usage) -> str:
    """Return the sentence about a standing."""
    return _SENTENCES[standing](figures, usage)


def _describe_within(figures: Figures, usage: Usage) -> str:
    tunnels = f"{_count(figures.now, 'tunnel is', 'tunnels are')} open"
    if figures.guideline is None:
        return f"{tunnels}, and there is no guideline to compare that with."
    return f"{tunnels}, which is within the guideline of {_number(figures.guideline)}."


def _describe_spike(figures: Figures, usage: Usage) -> str:
    return (
        f"{_more(figures)} were open in the last 24 hours, up to {_number(figures.latest_peak)}, and a spike now and"
        " then is fine."
    )


def _describe_repeated(figures: Figures, usage: Usage) -> str:
    return (
        f"{_more(figures)} were open in {_number(figures.hours_over)} of the last {_number(figures.hours_measured)}"
        f" measured hours, on {figures.days_over} days, and up to {_number(figures.peak)} at once."
    )


def _describe_sustained(figures: Figures, usage: Usage) -> str:
    days = f"{figures.days_sustained} of the last {usage.sustained.days_looked_at} measured days"
    p95 = f", and the 95th percentile of a day was {_number(round(figures.p95))}" if figures.p95 is not None else ""
    return f"{_more(figures)} were open for many hours of {days}{p95}."


def _describe_disproportionate(figures: Figures, usage: Usage) -> str:
    resource = _RESOURCES[figures.resource] if figures.resource is not None else "resources"
    scarcity = _SCARCITIES[figures.scarcity] if figures.scarcity is not None else "resources"
    return (
        f"It uses {_percent(figures.share)} of the {resource} of all sites, where its plan suggests"
        f" {_percent(figures.suggested_share)}, while {_percent(figures.scarcity_share)} of the machine's {scarcity}"
        " is in use."
    )


def _describe_abuse(figures: Figures, usage: Usage) -> str:
    flood = _FLOODS[figures.flood] if figures.flood is not None else "connections look like a flood"
    number = figures.flood_addresses
    addresses = f"about {_count(number, 'address', 'addresses')}" if number else "addresses that nobody counted"
    return (
        f"{_number(round(figures.flood_rate))} {flood} each second, from {addresses}, and"
        f" {_percent(figures.flood_share)} of its connections are of such kinds."
    )


_SENTENCES: Mapping[Standing, Callable[[Figures, Usage], str]] = {
    Standing.WITHIN: _describe_within,
    Standing.SPIKE: _describe_spike,
    Standing.REPEATED: _describe_repeated,
    Standing.SUSTAINED: _describe_sustained,
    Standing.DISPROPORTIONATE: _describe_disproportionate,
    Standing.SUSPECTED_ABUSE: _describe_abuse,
}


def _more(figures: Figures) -> str:
    return f"More tunnels than the guideline of {_number(figures.guideline)}"


def _number(number: int | None) -> str:
    """Group the digits by spaces, which people of all countries read in the same way."""
    return f"{number or 0:,}".replace(",", " ")


def _count(number: int, one: str, many: str) -> str:
    return f"{_number(number)} {one if number == 1 else many}"


def _percent(share: float | None) -> str:
    percent = 100 * (share or 0.0)
    return f"{percent:.0f} %" if percent >= 1 or percent == 0 else f"{percent:.2g} %"
