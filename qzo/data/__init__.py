"""From rows to tokens: records, chat templates, tokenizing, examples, tasks."""
