"""An OpenAI-compatible endpoint through which programs of all kinds ask the model of a rank."""
