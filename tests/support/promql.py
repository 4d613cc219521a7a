"""Names in PromQL."""

from __future__ import annotations

from typing import Any

import promql_parser as promql


def metric_names(expression: Any) -> set[str]:
    """Every metric that a parsed query reads. Raises TypeError for what it does not know, so that
    nothing goes unseen."""
    match expression:
        case promql.VectorSelector():
            return {expression.name}
        case promql.MatrixSelector():
            return metric_names(expression.vector_selector)
        case promql.BinaryExpr():
            return metric_names(expression.lhs) | metric_names(expression.rhs)
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr():
            return metric_names(expression.expr)
        case promql.Call():
            return set().union(*map(metric_names, expression.args))
        case promql.NumberLiteral():
            return set()
    raise TypeError(type(expression).__name__)
