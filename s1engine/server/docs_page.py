"""``GET /docs``: the routes and their fields, as one page that loads nothing else."""

from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; margin: 24px auto;
max-width: 900px; padding: 0 16px; } code { font-family: ui-monospace, monospace; }
summary { cursor: pointer; padding: 6px 0; } table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid #8884; padding: 4px 12px 4px 0; vertical-align: top; font-size: 14px; }
"""


def docs_page(schema: dict[str, Any]) -> str:
    """Return the page of an OpenAPI schema."""
    routes = [
        _route(schema, method, path, operation)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>"
        '<p>The whole schema: <a href="openapi.json">openapi.json</a>. '
        "Fields of other engines pass where they ask for nothing.</p>"
        f"{''.join(routes)}</body></html>"
    )


def _route(schema: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    text = escape(operation.get("description") or operation.get("summary") or "")
    head = f"<code>{method.upper()} {escape(path)}</code> {text}"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    fields = _resolved(schema, body.get("schema", {})).get("properties", {})
    if not fields:
        return f"<p>{head}</p>"
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(field))}</td>"
        f"<td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in fields.items()
    )
    return f"<details><summary>{head}</summary><table>{rows}</table></details>"


def _resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    name = part.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = schema["components"]["schemas"][name] if name else part
    return found


def _kind(field: dict[str, Any]) -> str:
    """Return a field's types, without null."""
    kinds = [
        part.get("$ref", "").rpartition("/")[2] or str(part.get("type") or part.get("const", "any"))
        for part in field.get("anyOf", [field])
    ]
    return " or ".join(kind for kind in kinds if kind != "null")
