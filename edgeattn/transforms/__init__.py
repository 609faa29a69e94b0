"""Model -> Model, each with a report: the passes a recipe asks for, applied as weights are read."""
