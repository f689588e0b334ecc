"""HTTP: OpenAI's endpoints over the engine. The pages in a browser are clients of the same model."""
