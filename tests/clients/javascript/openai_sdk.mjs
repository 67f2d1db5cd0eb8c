// openai for JavaScript: a chat whole and streamed, a tool, a structured answer, a response.
import OpenAI from "openai";
import { MESSAGES, MODEL, QUESTION, SCHEMA, TOOL, report } from "./common.mjs";

const client = new OpenAI({ maxRetries: 0 }); // OPENAI_BASE_URL, OPENAI_API_KEY
const chat = { model: MODEL, messages: MESSAGES, temperature: 0 };

const whole = await client.chat.completions.create(chat);
let streamed = "";
let streamUsage = null;
const options = { include_usage: true };
const parts = await client.chat.completions.create({ ...chat, stream: true, stream_options: options });
for await (const part of parts) {
  streamed += part.choices[0]?.delta?.content ?? "";
  streamUsage = part.usage ?? streamUsage;
}
const called = await client.chat.completions.create({
  ...chat,
  tools: [TOOL],
  tool_choice: "required",
  parallel_tool_calls: false,
});
const sized = await client.chat.completions.create({
  ...chat,
  response_format: { type: "json_schema", json_schema: { name: "size", schema: SCHEMA, strict: true } },
});
const events = [];
let response = null;
for await (const event of client.responses.stream({ model: MODEL, input: QUESTION, store: false })) {
  events.push(event.type);
  if (event.type === "response.completed") response = event.response;
}
const counts = (usage) => [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens];
const call = called.choices[0].message.tool_calls[0].function;
report({
  text: whole.choices[0].message.content,
  reasoning: whole.choices[0].message.reasoning,
  usage: counts(whole.usage),
  whole: whole.choices[0].message.content,
  streamed,
  stream_usage: counts(streamUsage),
  tool: { name: call.name, arguments: call.arguments },
  structured: JSON.parse(sized.choices[0].message.content),
  response: response.output_text ?? response.output.at(-1).content[0].text,
});
