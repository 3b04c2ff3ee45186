"""Tool-calling dialogues made from a grammar: tools that really run, scenario families, and checks of what was made."""
