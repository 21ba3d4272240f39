-- Whose turn it is. KEYS: lists
-- Reply: for each list the task id of the message that is taken next, "" where it has none, nil for an empty list. The
-- message itself, which may be large, stays here.
local ids = {}
for place, list in ipairs(KEYS) do
  local item = redis.call('LINDEX', list, -1)
  -- The last one that looks so: what comes before are headers, where a caller may write what he likes.
  ids[place] = item and (string.match(item, '.*"correlation_id": "([^"]*)"') or '')
end
return ids
