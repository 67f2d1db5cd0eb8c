"""The engine over HTTP: OpenAI's and Anthropic's APIs, admission, streaming, and a router."""
