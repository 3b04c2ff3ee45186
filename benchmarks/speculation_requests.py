"""The requests of benchmarks/speculation.py: tool calls whose arguments stand in the question, and chats.

Made for this: values are copied into the arguments as agents copy them (addresses, paths, dates, order numbers, quoted
text); one request has a call before it. Half of the chats repeat what they were given, half make something up.
"""

from typing import Any

Body = dict[str, Any]


def _tool(name: str, description: str, /, **properties: Any) -> Body:
    """A property is a description of a string, or a schema."""
    schemas = {
        key: {"type": "string", "description": value} if isinstance(value, str) else value
        for key, value in properties.items()
    }
    parameters = {
        "type": "object", "properties": schemas, "required": list(schemas), "additionalProperties": False
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = _tool("get_weather", "Current weather", city="The city", unit={"enum": ["celsius", "fahrenheit"]})
MAIL = _tool("send_email", "Send an email", to="Address of the recipient", subject="Subject line", body="The text")
EVENT = _tool(
    "create_event", "Put an event into the calendar",
    title="Title", date="YYYY-MM-DD", start_time="HH:MM", location="Where",
)  # fmt: skip
ORDER = _tool("lookup_order", "Status of an order", order_id="Order number", customer_email="Email of the customer")
FLIGHT = _tool(
    "search_flights", "Flights between two airports",
    origin="IATA code", destination="IATA code", departure_date="YYYY-MM-DD", passengers={"type": "integer"},
)  # fmt: skip
QUERY = _tool("run_query", "Run an SQL query", database="Name of the database", query="SQL text")
FILE = _tool("read_file", "Read a file", path="Absolute path", encoding={"enum": ["utf-8", "latin-1"]})
TICKET = _tool(
    "open_ticket", "Open a support ticket",
    customer="Name", product="Product", priority={"enum": ["low", "normal", "high"]},
    description="What is wrong, in the customer's words",
)  # fmt: skip
MONEY = _tool(
    "transfer_money", "Transfer money between accounts",
    from_account="IBAN", to_account="IBAN", amount={"type": "number"}, currency={"enum": ["EUR", "USD", "GBP"]},
    reference="Reference text",
)  # fmt: skip
SEARCH = _tool("search_documents", "Search the documentation", query="What for", max_results={"type": "integer"})
REMINDER = _tool("set_reminder", "Set a reminder", text="What to be reminded of", when="ISO 8601")
TRANSLATE = _tool("translate", "Translate", text="The text", source_language="Code", target_language="Code")


def _asked(text: str, *tools: Body) -> Body:
    """One tool is named in `tool_choice`; of several the model must pick one."""
    name = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
    return {
        "messages": [{"role": "user", "content": text}],
        "tools": list(tools),
        "tool_choice": name if len(tools) == 1 else "required",
        "parallel_tool_calls": False,
    }


def _said(role: str, content: str, **fields: Any) -> Body:
    return {"role": role, "content": content, **fields}


_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Reykjavik", "unit": "celsius"}'},
}

TOOL_CALLS: list[Body] = [
    _asked("What is the weather in San Francisco, in celsius?", WEATHER),
    _asked(
        "Send an email to maria.gonzalez@example.com with the subject 'Quarterly report' saying: The quarterly report "
        "is attached, please review it before Friday.",
        MAIL,
    ),
    _asked(
        "Put 'Dentist appointment' into my calendar for 2026-03-14 at 09:30, location: 12 Harbour Street, Bristol.",
        EVENT,
        REMINDER,
    ),
    _asked("Where is order ORD-48213-BX? The customer is john.smith@example.org.", ORDER),
    _asked("Find flights from LIS to CPH on 2026-07-02 for 2 passengers.", FLIGHT, WEATHER),
    _asked(
        "Run this query on the database sales_2025: SELECT customer_id, SUM(amount) FROM invoices "
        "GROUP BY customer_id ORDER BY 2 DESC",
        QUERY,
    ),
    _asked("Read the file /home/anna/projects/sterna/config/settings.toml as utf-8.", FILE),
    _asked(
        "Customer Oliver Brandt says about the product ThermoPump X200: the pump makes a grinding noise after ten "
        "minutes and then switches itself off. Priority high. Open a ticket.",
        TICKET,
        ORDER,
    ),
    _asked(
        "Transfer 1250.50 EUR from DE89370400440532013000 to FR1420041010050500013M02606 with the reference "
        "'Invoice 2026-117'.",
        MONEY,
    ),
    _asked("Search the documentation for how to rotate API keys without downtime; at most 5.", SEARCH, FILE, QUERY),
    _asked("Remind me to call the plumber about the leaking kitchen tap on 2026-02-11T17:00.", REMINDER),
    _asked("Translate from en to pt: The train to the airport leaves every twenty minutes from platform 4.", TRANSLATE),
    {
        **_asked("", WEATHER),
        "messages": [
            _said("user", "What is the weather in Reykjavik, in celsius?"),
            {"role": "assistant", "tool_calls": [_CALL]},
            _said("tool", '{"temperature": 4, "condition": "rain"}', tool_call_id="call_1"),
            _said("assistant", "It is 4 degrees celsius and raining in Reykjavik."),
            _said("user", "And in Buenos Aires, in celsius?"),
        ],
    },
]

_TERNS = (
    "The Arctic tern is a bird in the tern family. It is strongly migratory, seeing two summers each year as it flies "
    "from its northern breeding grounds to the Antarctic coast for the southern summer and back again."
)
_FUNCTION = """def average(values):
    totl = 0
    for value in values:
        totl += value
    retrun totl / len(values)
"""

CHATS: list[Body] = [
    {"messages": [_said("user", text)]}
    for text in (
        "Name three primary colors and say one sentence about each.",
        "Why is the sky blue? Explain it to a child.",
        "Write a short story about a lighthouse keeper.",
        f"Repeat the following text, then say in one sentence what it is about.\n\n{_TERNS}",
        f"Fix the typos in this function and print all of it.\n\n{_FUNCTION}",
        "List the months of the year, one per line, with the number of days in each.",
    )
]
