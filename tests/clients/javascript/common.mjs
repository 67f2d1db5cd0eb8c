// What the scripts ask, and how they report: one JSON object on the last line of stdout.

export const MODEL = "s1-nano";
export const QUESTION = "a=3 b=a+4 c=b*2 c?";
export const NEXT_QUESTION = "k=3 b=k+4 b?"; // the result of the tool
export const MESSAGES = [{ role: "user", content: QUESTION }];
export const PARAMETERS = {
  type: "object",
  properties: {
    city: { type: "string", enum: ["Oslo", "Rome"] },
    days: { type: "integer", enum: [1, 2, 3] },
  },
  required: ["city", "days"],
  additionalProperties: false,
};
export const TOOL = {
  type: "function",
  function: { name: "forecast", description: "Weather.", parameters: PARAMETERS },
};
export const SCHEMA = {
  type: "object",
  properties: {
    value: { type: "integer", enum: [1, 2, 3] },
    unit: { type: "string", enum: ["cm", "m"] },
  },
  required: ["value", "unit"],
  additionalProperties: false,
};

export function report(results) {
  console.log(JSON.stringify(results));
}
