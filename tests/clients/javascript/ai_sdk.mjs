// The AI SDK: chat by two providers, objects, tool loops by chat, responses and messages.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { NEXT_QUESTION, MODEL, PARAMETERS, QUESTION, SCHEMA, report } from "./common.mjs";

const baseURL = process.env.OPENAI_BASE_URL;
const apiKey = process.env.OPENAI_API_KEY;
const compatible = createOpenAICompatible({
  name: "s1engine",
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey });
const anthropic = createAnthropic({ baseURL, apiKey });

const ask = { prompt: QUESTION, maxRetries: 0 };
const greedy = { ...ask, model: compatible(MODEL), temperature: 0 };
const whole = await generateText(greedy);
const stream = streamText(greedy);
let streamed = "";
for await (const part of stream.textStream) streamed += part;
const usage = await stream.usage;

const sized = await generateText({ ...greedy, output: Output.object({ schema: jsonSchema(SCHEMA) }) });

// The first step is a forced call, the second answers with the tool's result.
async function loop(model) {
  let calls = 0;
  const forecast = tool({
    description: "Weather.",
    inputSchema: jsonSchema(PARAMETERS),
    execute: async () => {
      calls += 1;
      return NEXT_QUESTION;
    },
  });
  const result = await generateText({
    ...ask,
    model,
    tools: { forecast },
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  });
  const call = result.steps[0].toolCalls[0];
  return { calls, text: result.text, name: call.toolName, arguments: JSON.stringify(call.input) };
}

const loops = {
  chat: await loop(compatible(MODEL)),
  responses: await loop(openai(MODEL)),
  messages: await loop(anthropic(MODEL)),
};
report({
  text: whole.text,
  reasoning: whole.reasoningText,
  whole: whole.text,
  streamed,
  usage: [usage.inputTokens, usage.outputTokens, usage.totalTokens],
  structured: sized.output,
  response: (await generateText({ ...ask, model: openai(MODEL) })).text,
  loops,
});
