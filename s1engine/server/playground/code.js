/* A request as text of other programs. The key is never part of it. */

const OPENAI = new Set(["messages", "model", "temperature", "max_tokens", "stream", "stream_options"]);

export function curl(body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl ${location.origin}/v1/chat/completions \\
  -H "Authorization: Bearer $S1ENGINE_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d '${quoted}'`;
}

export function python(body) {
  const own = Object.entries(body).filter(([name]) => !OPENAI.has(name));
  const lines = Object.entries(body)
    .filter(([name]) => OPENAI.has(name))
    .map(([name, value]) => `    ${name}=${literal(value)},`);
  if (own.length) lines.push(`    extra_body=${literal(Object.fromEntries(own))},`);
  return `import os

from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ.get("S1ENGINE_API_KEY", "none"))
stream = client.chat.completions.create(
${lines.join("\n")}
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
`;
}

/* JSON differs from Python in three words. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, item]) => `"${name}": ${literal(item)}`).join(", ")}}`;
}
