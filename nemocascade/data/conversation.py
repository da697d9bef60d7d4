"""The one typed form that every row format becomes."""

from __future__ import annotations

from dataclasses import dataclass

from nemocascade.types import ROLES, Message, Role, Tool, ToolCall

__all__ = ["ROLES", "Conversation", "Message", "Role", "Tool", "ToolCall"]


@dataclass(frozen=True)
class Conversation:
    """Turns in order. A system turn, if there is one, stands first."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    @property
    def last_user(self) -> int:
        """Index of the last user turn, -1 without one. Results of tools are not user turns."""
        users = [i for i, m in enumerate(self.messages) if m.role == "user"]
        return users[-1] if users else -1
