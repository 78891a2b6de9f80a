"""The functions that a request has, and whether the reply may or must call them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from manyheads.errors import require
from manyheads.frontend.tools.use import ToolUse
from manyheads.server.body import Body

MAX_TOOLS = 1024
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,256}$")]


class Function(Body):
    """A function can be called."""

    keeps_unknown: ClassVar[bool] = True
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="a JSON Schema of its arguments, an object")
    strict: bool | None = Field(default=None, description="calls that must be made hold to the schema in any case")


class Tool(Body):
    """A tool is a function."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """It names a function."""

    name: Name


class NamedTool(Body):
    """This function must be called."""

    type: Literal["function"]
    function: FunctionName


class Allowed(Body):
    """Only these functions may, or must, be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedTools(Body):
    """Only some of the functions may, or must, be called."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


def tool_use(tools: list[Tool] | None, choice: Choice | None, parallel: bool | None) -> ToolUse:
    """Make what a request says about functions one thing. Raises RequestError where that makes no sense."""
    functions = {tool.function.name: tool.model_dump(exclude_none=True) for tool in tools or ()}
    named: list[str] = []
    if isinstance(choice, NamedTool):
        named = [choice.function.name]
    elif isinstance(choice, AllowedTools):
        named = [tool.function.name for tool in choice.allowed_tools.tools]
        functions = {name: tool for name, tool in functions.items() if name in named} if tools else functions
    for name in named:
        require(name in functions, f"tool_choice names {name!r}, which tools does not have")
    must = choice == "required" or isinstance(choice, NamedTool)
    if isinstance(choice, AllowedTools):
        must = choice.allowed_tools.mode == "required"
    require(bool(functions) or not must, "tool_choice asks for a call, and there are no tools")
    if choice == "none":
        return ToolUse()
    must_call = tuple(named or functions) if must else ()
    is_named = isinstance(choice, NamedTool)  # one call of that function
    return ToolUse(tuple(functions.values()), must_call, parallel is not False and not is_named)
