"""The engine over HTTP: schemas and bounds in, OpenAI's answers out."""
