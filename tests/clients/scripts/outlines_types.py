"""outlines: text, a choice, a model of pydantic and a regular expression, by OpenAI and vLLM."""

import json
from typing import Literal

import openai
import outlines
from common import KEY, MODEL, QUESTION, URL, report
from outlines.types import Regex
from pydantic import BaseModel, ConfigDict


class Size(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else any more keys may follow
    value: Literal[1, 2, 3]
    unit: Literal["cm", "m"]


client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
hosted = outlines.from_openai(client, MODEL)
vllm = outlines.from_vllm(client, MODEL)
report(
    text=hosted(QUESTION),
    structured=json.loads(hosted(QUESTION, Size)),
    by_vllm=json.loads(vllm(QUESTION, Size)),
    choice=vllm(QUESTION, Literal["red", "blue"]),
    matched=vllm(QUESTION, Regex("[0-9]{3}")),
)
