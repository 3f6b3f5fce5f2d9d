"""The screen of ``tlstunnel top``.

Tested by tests/e2e/test_top.py.
"""

import contextlib
import dataclasses
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Static

from tlstunnel.cli.top.details import describe_item, describe_refusal
from tlstunnel.cli.top.headline import Headline
from tlstunnel.cli.top.source import Items, Source
from tlstunnel.cli.top.tables import TABLES, Row, Tab, View, arrange
from tlstunnel.commands.records import Refusal
from tlstunnel.commands.tunnels import TunnelStatus
from tlstunnel.errors import ControlError
from tlstunnel.escaping import printable

TABS: tuple[Tab, ...] = ("sites", "tunnels", "origins", "refusals")

MOST_ROWS = 500
"""Rows on the screen. A filter finds the others."""


class Details(ModalScreen[bool]):
    """Lines about one thing; with `question`, it can be confirmed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,n", "close", "close"),
        Binding("y", "confirm", "yes"),
    ]

    CSS = """
    Details { align: center middle; }
    Details > Vertical { width: 80%; max-width: 120; height: auto; max-height: 80%; border: round $primary;
        padding: 0 1; background: $surface; }
    Details VerticalScroll { height: auto; max-height: 100%; }
    Details #answer { dock: bottom; height: 1; text-style: bold; }
    """

    def __init__(self, lines: Text, question: str = "") -> None:
        super().__init__()
        self._lines = lines
        self._question = question

    def compose(self) -> ComposeResult:
        """Show the lines."""
        with Vertical():
            with VerticalScroll():
                yield Static(self._lines)
            # Below what can be scrolled, so that it is seen on a small screen too.
            yield Static(f"{self._question} [y/n]" if self._question else "esc closes", markup=False, id="answer")

    def action_close(self) -> None:
        """Go back without doing anything."""
        self.dismiss(False)

    def action_confirm(self) -> None:
        """Say yes, if there is a question."""
        if self._question:
            self.dismiss(True)


class Top(App[None]):
    """Shows what `source` knows, asked every `seconds`."""

    TITLE = "tlstunnel top"
    ENABLE_COMMAND_PALETTE = False

    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number), f"show('{tab}')", tab) for number, tab in enumerate(TABS, 1)),
        Binding("s", "sort(1)", "sort"),
        Binding("S", "sort(-1)", "sort back", show=False),
        Binding("r", "reverse", "reverse"),
        Binding("slash", "search", "filter"),
        Binding("enter", "open", "open", priority=True),
        Binding("escape", "leave", "back"),
        Binding("x", "end", "end tunnel"),
        Binding("space", "pause", "pause"),
        Binding("q", "quit", "quit"),
    ]

    CSS = """
    #headline { height: auto; padding: 0 1; }
    #title { height: 1; padding: 0 1; text-style: bold; }
    #search { display: none; border: none; height: 1; padding: 0 1; background: $boost; }
    #search.shown { display: block; }
    DataTable { height: 1fr; }
    """

    def __init__(self, source: Source, seconds: float) -> None:
        super().__init__()
        self._source = source
        self._seconds = seconds
        self._headline = Headline(source)
        self._tab: Tab = "sites"
        self._site = ""
        self._views: dict[Tab, View] = {tab: View() for tab in TABS}
        self._items = Items((), 0)
        self._shown: list[Row] = []
        self._paused = False
        self._problem = ""

    def compose(self) -> ComposeResult:
        """Lay out the screen."""
        yield Static("connecting", id="headline", markup=False)
        yield Static("", id="title", markup=False)
        yield Input(placeholder="only rows that contain", id="search")
        yield DataTable(cursor_type="row", zebra_stripes=True, id="table")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to ask."""
        self._table.focus()
        self.refresh_items()
        self.set_interval(self._seconds, self._tick)

    @property
    def _table(self) -> "DataTable[Text]":
        return self.query_one("#table", DataTable)

    @property
    def _view(self) -> View:
        return self._views[self._tab]

    def _tick(self) -> None:
        if not self._paused:
            self.refresh_items()

    # --- asking -------------------------------------------------------------------------------------------------------

    @work(thread=True, exclusive=True, group="items")
    def refresh_items(self) -> None:
        """Ask, in a thread, and show the result."""
        tab, site = self._tab, self._site
        try:
            headline = self._headline.ask()
            items = self._source.list_items(tab, site)
        except ControlError as error:
            self.call_from_thread(self._show_problem, str(error))
        else:
            self.call_from_thread(self._show, tab, site, headline, items)

    def _show_problem(self, problem: str) -> None:
        self._problem = problem
        self.query_one("#headline", Static).update(Text(printable(problem), style="bold red"))

    def _show(self, tab: Tab, site: str, headline: Text, items: Items) -> None:
        self._problem = ""
        self.query_one("#headline", Static).update(headline)
        if (tab, site) == (self._tab, self._site):  # or it was changed meanwhile
            self._items = items
            self._show_rows()

    # --- showing ------------------------------------------------------------------------------------------------------

    def _show_rows(self) -> None:
        table, widget = TABLES[self._tab], self._table
        view = self._view
        rows = arrange(table, self._items.items, view)
        before = self._shown[widget.cursor_row].key if widget.cursor_row < len(self._shown) else None
        self._shown = rows[:MOST_ROWS]
        scrolled = widget.scroll_offset
        widget.clear(columns=True)
        for index, column in enumerate(table.columns):
            arrow = (" ▼" if column.number != view.reverse else " ▲") if index == view.column else ""
            widget.add_column(column.heading + arrow, key=str(index))
        for row in self._shown:
            widget.add_row(
                *(
                    Text(cell, justify="right" if column.number else "left")
                    for column, cell in zip(table.columns, row.cells, strict=True)
                ),
                key=row.key,
            )
        keys = [row.key for row in self._shown]
        if before in keys:
            widget.move_cursor(row=keys.index(before), scroll=False)
            widget.scroll_to(scrolled.x, scrolled.y, animate=False, force=True)
        self._show_title(len(rows))

    def _show_title(self, matching: int) -> None:
        view = self._view
        parts = [f"{self._tab}{f' of {printable(self._site)}' if self._site else ''}"]
        total = self._items.total
        parts.append(f"{matching} of {total}" if matching != total or view.search else str(total))
        if matching > MOST_ROWS:
            parts.append(f"the first {MOST_ROWS} are shown")
        parts.append(f"by {TABLES[self._tab].columns[view.column].heading}")
        if view.search:
            parts.append(f'with "{printable(view.search)}"')
        if self._paused:
            parts.append("paused")
        self.query_one("#title", Static).update(" · ".join(parts))

    def _set_view(self, **changes: Any) -> None:
        self._views[self._tab] = dataclasses.replace(self._view, **changes)
        self._show_rows()

    def _switch(self, tab: Tab, site: str) -> None:
        self._tab, self._site = tab, site
        self._items, self._shown = Items((), 0), []
        self.query_one("#search", Input).value = self._view.search
        self._show_rows()
        self.refresh_items()

    # --- keys ---------------------------------------------------------------------------------------------------------

    def action_show(self, tab: Tab) -> None:
        """Show a table, of the same site."""
        self._switch(tab, "" if tab == "sites" else self._site)

    def action_sort(self, step: int) -> None:
        """Sort by the next column."""
        columns = len(TABLES[self._tab].columns)
        self._set_view(column=(self._view.column + step) % columns, reverse=False)

    def action_reverse(self) -> None:
        """Sort in the other direction."""
        self._set_view(reverse=not self._view.reverse)

    def action_search(self) -> None:
        """Filter by what is typed from now on."""
        search = self.query_one("#search", Input)
        search.add_class("shown")
        self.screen.set_focus(search)  # at once, unlike `focus`: what is typed next is for the filter already

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while typing."""
        if event.value != self._view.search:
            self._set_view(search=event.value)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave Enter to the screen that shows details."""
        return not (action == "open" and isinstance(self.screen, Details))

    def action_open(self) -> None:
        """Keep the filter and go back to the table, or open the row at the cursor."""
        if self.query_one("#search", Input).has_focus:
            self._leave_search()
        else:
            self._table.action_select_cursor()

    def _leave_search(self) -> None:
        search = self.query_one("#search", Input)
        if not search.value:
            search.remove_class("shown")
        self.screen.set_focus(self._table)

    def action_leave(self) -> None:
        """Leave the filter, or the site."""
        search = self.query_one("#search", Input)
        if search.has_focus or self._view.search:
            search.value = ""
            self._leave_search()
        elif self._site:
            self._switch("sites", "")

    def on_data_table_row_selected(self, event: "DataTable.RowSelected") -> None:
        """Open the row at the cursor: the tunnels of a site, or what is known of the rest."""
        if event.cursor_row >= len(self._shown):
            return
        row = self._shown[event.cursor_row]
        item = self._find_item(row)
        if self._tab == "sites":
            self._switch("tunnels", row.site)
        elif isinstance(item, Refusal):
            self.push_screen(Details(describe_refusal(item)))
        elif item is not None:
            self.push_screen(Details(describe_item(item)))

    def action_end(self) -> None:
        """End the tunnel at the cursor, after a question."""
        cursor = self._table.cursor_row
        if self._tab != "tunnels" or cursor >= len(self._shown):
            self.notify("choose a tunnel first: 2 shows them", severity="warning")
            return
        item = self._find_item(self._shown[cursor])
        if isinstance(item, TunnelStatus):

            def handle_answer(confirmed: bool | None) -> None:
                if confirmed:
                    self._end_tunnel(item.id)

            self.push_screen(Details(describe_item(item), "End this tunnel?"), handle_answer)

    @work(thread=True, group="end")
    def _end_tunnel(self, tunnel: str) -> None:
        try:
            ended = self._source.end_tunnel(tunnel)
        except ControlError as error:
            self.call_from_thread(self.notify, str(error), severity="error", markup=False)
        else:
            text = "the tunnel is being ended" if ended.number else "the tunnel has ended already"
            self.call_from_thread(self.notify, text)
            self.call_from_thread(self.refresh_items)

    def action_pause(self) -> None:
        """Keep what is shown, or go on."""
        self._paused = not self._paused
        self._show_rows()

    def _find_item(self, row: Row) -> Any:
        identify = TABLES[self._tab].identify
        with contextlib.suppress(StopIteration):
            return next(item for item in self._items.items if identify(item) == row.key)
        return None
