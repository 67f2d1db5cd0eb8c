// anthropic for JavaScript: a message whole and streamed, a tool, a count of tokens.
import Anthropic from "@anthropic-ai/sdk";
import { MESSAGES, MODEL, PARAMETERS, report } from "./common.mjs";

const client = new Anthropic({ maxRetries: 0 }); // ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY
const thinking = { type: "enabled", budget_tokens: 1024 };
const body = { model: MODEL, max_tokens: 1500, messages: MESSAGES, temperature: 0, thinking };
const text = (message) =>
  message.content
    .filter((block) => block.type === "text")
    .map((block) => block.text)
    .join("");

const whole = await client.messages.create(body);
const stream = client.messages.stream(body);
const final = await stream.finalMessage();
const called = await client.messages.create({
  ...body,
  thinking: { type: "disabled" },
  tools: [{ name: "forecast", description: "Weather.", input_schema: PARAMETERS }],
  tool_choice: { type: "tool", name: "forecast", disable_parallel_tool_use: true },
});
const call = called.content.find((block) => block.type === "tool_use");
const count = await client.messages.countTokens({ model: MODEL, messages: MESSAGES });
report({
  text: text(whole),
  reasoning: whole.content.find((block) => block.type === "thinking").thinking,
  whole: text(whole),
  streamed: text(final),
  tool: { name: call.name, arguments: JSON.stringify(call.input) },
  counted: count.input_tokens,
  input_tokens: [whole, final].map(
    (message) => message.usage.input_tokens + message.usage.cache_read_input_tokens,
  ),
});
