"""Tools of the workplace for visits of its site, tasks and customers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from nemocascade.envs.applications import CallError, tool
from nemocascade.envs.workplace.databases import (
    Databases,
    between,
    lower,
    matching,
    need,
    one_of,
    page_of,
)
from nemocascade.envs.workplace.tables import BOARDS, FILES, LISTS, PRODUCTS, STATUSES, Record

PLOTS = ("bar", "line", "scatter", "histogram")
PLOTTED = (
    *("total_visits", "session_duration_seconds", "user_engaged", "visits_direct"),
    *("visits_referral", "visits_search_engine", "visits_social_media"),
)
_ADDRESS = re.compile(r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}")


class Records(Databases):
    """Visits, tasks and customers."""

    @tool
    def analytics_get_visitor_information_by_id(self, visitor_id: str | None = None) -> Any:
        """Return the visits of a visitor."""
        need(visitor_id=visitor_id)
        self.tables["analytics"].get("visitor_id", visitor_id)
        return list(map(_visit, self.tables["analytics"].where("visitor_id", visitor_id)))

    @tool
    def analytics_create_plot(
        self,
        time_min: str | None = None,
        time_max: str | None = None,
        value_to_plot: str | None = None,
        plot_type: str | None = None,
    ) -> Any:
        """Plot a value of the visits between two days to a file."""
        need(time_min=time_min, time_max=time_max)
        one_of("value_to_plot", value_to_plot, PLOTTED)
        one_of("plot_type", plot_type, PLOTS)
        path = f"plots/{time_min}_{time_max}_{value_to_plot}_{plot_type}.png"
        self.tables["plots"].add({"file_path": path})
        return path

    @tool
    def analytics_total_visits_count(
        self, time_min: str | None = None, time_max: str | None = None
    ) -> Any:
        """Count the visits of each day."""
        return self._by_day(time_min, time_max, len)

    @tool
    def analytics_engaged_users_count(
        self, time_min: str | None = None, time_max: str | None = None
    ) -> Any:
        """Count the engaged users of each day."""
        return self._by_day(
            time_min, time_max, lambda visits: sum(v["user_engaged"] == "True" for v in visits)
        )

    @tool
    def analytics_traffic_source_count(
        self,
        time_min: str | None = None,
        time_max: str | None = None,
        traffic_source: str | None = None,
    ) -> Any:
        """Count the visits of each day from a source, or from all."""

        def count(visits: Sequence[Record]) -> int:
            sources = Counter(v["traffic_source"] for v in visits)
            return sources[traffic_source] if traffic_source else len(visits)

        return self._by_day(time_min, time_max, count)

    @tool
    def analytics_get_average_session_duration(
        self, time_min: str | None = None, time_max: str | None = None
    ) -> Any:
        """Return the mean session of each day in seconds."""
        return self._by_day(
            time_min,
            time_max,
            lambda visits: fmean(float(v["session_duration_seconds"]) for v in visits),
        )

    @tool
    def project_management_get_task_information_by_id(
        self, task_id: str | None = None, field: str | None = None
    ) -> Any:
        """Return one field of a task."""
        return self.field_of("tasks", "task_id", task_id, field)

    @tool
    def project_management_search_tasks(
        self,
        task_name: str | None = None,
        assigned_to_email: str | None = None,
        list_name: str | None = None,
        due_date: str | None = None,
        board: str | None = None,
    ) -> Any:
        """Find tasks by parts of their fields; the assignee's address must be whole."""
        parts = {"task_name": task_name, "list_name": list_name, "due_date": due_date}
        parts["board"] = board
        if not assigned_to_email and not any(parts.values()):
            raise CallError("give at least one field")
        found = matching(self.tables["tasks"].records(), parts)
        if assigned_to_email:
            address = lower("assigned_to_email", assigned_to_email)
            if not _ADDRESS.fullmatch(address):
                raise CallError(f"{assigned_to_email!r} is not an e-mail address")
            found = [t for t in found if str(t["assigned_to_email"]).lower() == address]
        return found

    @tool
    def project_management_create_task(
        self,
        task_name: str | None = None,
        assigned_to_email: str | None = None,
        list_name: str | None = None,
        due_date: str | None = None,
        board: str | None = None,
    ) -> Any:
        """Create a task."""
        values = {
            "task_name": task_name,
            "assigned_to_email": assigned_to_email,
            "list_name": list_name,
            "due_date": due_date,
            "board": board,
        }
        need(**values)
        values = {field: self._task_value(field, value) for field, value in values.items()}
        return self.add("tasks", "task_id", values)

    @tool
    def project_management_delete_task(self, task_id: str | None = None) -> Any:
        """Delete a task."""
        return self.remove("tasks", "task_id", task_id)

    @tool
    def project_management_update_task(
        self, task_id: str | None = None, field: str | None = None, new_value: str | None = None
    ) -> Any:
        """Change one field of a task."""
        need(task_id=task_id, field=field, new_value=new_value)
        one_of("field", field, FILES["tasks"][1])
        value = self._task_value(str(field), new_value)
        self.tables["tasks"].change("task_id", task_id, str(field), value)
        return "updated"

    @tool
    def customer_relationship_manager_search_customers(
        self,
        customer_name: str | None = None,
        customer_email: str | None = None,
        product_interest: str | None = None,
        status: str | None = None,
        assigned_to_email: str | None = None,
        last_contact_date_min: str | None = None,
        last_contact_date_max: str | None = None,
        follow_up_by_min: str | None = None,
        follow_up_by_max: str | None = None,
        page: int = 1,
        page_size: int = 5,
    ) -> Any:
        """Find customers by parts of their fields and by bounds of their dates."""
        parts = {
            "customer_name": customer_name,
            "customer_email": customer_email,
            "product_interest": product_interest,
            "status": status,
            "assigned_to_email": assigned_to_email,
        }
        bounds = (
            ("last_contact_date", last_contact_date_min, last_contact_date_max),
            ("follow_up_by", follow_up_by_min, follow_up_by_max),
        )
        if not any([*parts.values(), *(b for _, *both in bounds for b in both)]):
            raise CallError("give at least one field")
        found = matching(self.tables["customers"].records(), parts)
        for field, low, high in bounds:
            found = [c for c in found if between(c[field], low, high)]
        return page_of("customers", found, page, page_size)

    @tool
    def customer_relationship_manager_update_customer(
        self, customer_id: str | None = None, field: str | None = None, new_value: str | None = None
    ) -> Any:
        """Change one field of a customer."""
        need(customer_id=customer_id, field=field, new_value=new_value)
        one_of("field", field, FILES["customers"][1])
        if field in ("status", "product_interest"):
            one_of(field, new_value, STATUSES if field == "status" else PRODUCTS)
        if field in ("customer_email", "assigned_to_email"):
            new_value = lower("new_value", new_value)
        self.tables["customers"].change("customer_id", customer_id, str(field), new_value)
        return "updated"

    @tool
    def customer_relationship_manager_add_customer(
        self,
        customer_name: str | None = None,
        assigned_to_email: str | None = None,
        status: str | None = None,
        customer_email: str | None = None,
        customer_phone: str | None = None,
        last_contact_date: str | None = None,
        product_interest: str | None = None,
        notes: str | None = "",
        follow_up_by: str | None = None,
    ) -> Any:
        """Add a customer."""
        need(customer_name=customer_name, assigned_to_email=assigned_to_email, status=status)
        values = {
            "customer_name": customer_name,
            "assigned_to_email": lower("assigned_to_email", assigned_to_email),
            "status": status,
            "customer_email": customer_email and lower("customer_email", customer_email),
            "customer_phone": customer_phone,
            "last_contact_date": last_contact_date,
            "product_interest": product_interest,
            "notes": notes,
            "follow_up_by": follow_up_by,
        }
        return self.add("customers", "customer_id", values)

    @tool
    def customer_relationship_manager_delete_customer(self, customer_id: str | None = None) -> Any:
        """Delete a customer."""
        return self.remove("customers", "customer_id", customer_id)

    def _task_value(self, field: str, value: Any) -> Any:
        """Return a task's value as stored. Raises CallError for one that the field cannot have."""
        if field in ("list_name", "board"):
            one_of(field, value, LISTS if field == "list_name" else BOARDS)
        if field != "assigned_to_email":
            return value
        address = lower(field, value)
        team = {str(t["assigned_to_email"]).lower() for t in self.tables["tasks"].records()}
        if address not in team:
            raise CallError(f"{value!r} is nobody who has tasks")
        return address

    def _by_day(self, low: Any, high: Any, measure: Callable[[Sequence[Record]], float]) -> Any:
        days: dict[str, list[Record]] = {}
        for visit in self.tables["analytics"].records():
            if between(visit["date_of_visit"], low, high):
                days.setdefault(visit["date_of_visit"], []).append(visit)
        return {day: measure(days[day]) for day in sorted(days)}


def _visit(record: Record) -> Record:
    return {**record, "user_engaged": record["user_engaged"] == "True"}
