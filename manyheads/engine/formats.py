"""How JSON is written, and dates and times in JSON Schemas as the calendar has them.

The library that follows grammars takes a 29th of February in any year and a 60th second in any minute (RFC 3339 writes
leap seconds so), which other programs refuse. So these formats become patterns that hold for real dates alone.
"""

from __future__ import annotations

from typing import Any

JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written in one line, as Python does: a model that may write any whitespace can go on doing so for ever, and
where it has no choice, no step of it is needed. A schema's own `x-guidance` goes before this."""
_DAYS = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_LEAP_YEARS = "[0-9][0-9](0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00"
_DATE = f"([0-9]{{4}}-({_DAYS})|({_LEAP_YEARS})-02-29)"
_CLOCK = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_CLOCK}:[0-5][0-9](\\.[0-9]{{1,9}})?(Z|[+-]{_CLOCK})"
PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""Regular expressions for formats of strings; of leap seconds, none."""
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "unevaluatedProperties")
_MANY = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OTHERS = ("not", "if", "then", "else")


def json_form(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON Schema as it stands in the library's grammars."""
    return {"x-guidance": JSON_FORM, **with_real_dates(schema)}


def with_real_dates(schema: Any) -> Any:
    """A copy of a JSON Schema whose dates and times are real ones. What is no schema in it (constants, say) stays."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for word in (*_ONE, *_OTHERS):
        if word in found:
            found[word] = with_real_dates(found[word])
    for word in _MANY:
        if isinstance(found.get(word), list):
            found[word] = [with_real_dates(inner) for inner in found[word]]
    for word in _NAMED:
        if isinstance(found.get(word), dict):
            found[word] = {name: with_real_dates(inner) for name, inner in found[word].items()}
    # two patterns cannot hold at once here
    form = found.get("format")
    if isinstance(form, str) and form in PATTERNS and "pattern" not in found:
        del found["format"]
        found["pattern"] = PATTERNS[form]
    return found
