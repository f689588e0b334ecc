"""Text and the files it comes from: tokenizers, streaming, dialogue templates. Nothing heavy is imported here."""
