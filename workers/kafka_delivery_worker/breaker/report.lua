-- Report what became of records since the last time, and learn how the circuits are.
--
-- ARGV[4]: JSON list, the cluster first, of {scope, epoch, ok, fail, row, late, hard, open_ms, trips, forced, forced_ms}:
--   epoch    of the circuit that the records were sent under; else they say nothing about this one
--   ok, fail records by outcome;  row  1 if the last of them failed;  late  1 if one arrived that was sent before
--   hard     why the scope is down for sure, as this worker sees it, or ""
--   open_ms, trips, forced, forced_ms  what this worker knows: how long it is to stay open (-1 if it is not) and how it
--            is forced, for how long (0: until it is changed)
-- Reply: workers alive, then a view of the cluster's circuit and of each topic's that is known
local ALIVE = 5000        -- a worker reports each second
local TOPIC_KEPT = 600000
local TOPICS = 200        -- with circuits of their own; more would be the cluster's trouble
local FAILED_KEPT = 600000

redis.call('ZADD', base .. 'workers', now, worker)
redis.call('ZREMRANGEBYSCORE', base .. 'workers', '-inf', now - 60000)
redis.call('ZREMRANGEBYSCORE', base .. 'workers', now + 60000, '+inf')  -- by another host's clock, before a failover
local alive = redis.call('ZCOUNT', base .. 'workers', now - ALIVE, '+inf')

local function failing(s, since)  -- workers that failed since then
  local count = 0
  for _, at in ipairs(redis.call('HVALS', key(s.scope, 'f'))) do
    if tonumber(at) > since then count = count + 1 end
  end
  return count
end

local function window(s, ok, fail)  -- calls and failures of the last ten buckets, these included
  local width = rules.window_ms / 10
  local bucket = math.floor(now / width)
  local field = bucket % 10
  local calls, failures = 0, 0
  local stored = redis.call('HGETALL', key(s.scope, 'w'))
  for i = 1, #stored, 2 do
    local at, good, bad = string.match(stored[i + 1], '^(%d+)|([%d.]+)|([%d.]+)$')
    if tonumber(at) == bucket then
      ok, fail = ok + good, fail + bad
    elseif tonumber(at) > bucket - 10 and tonumber(at) < bucket then
      calls, failures = calls + good + bad, failures + bad
    end
  end
  redis.call('HSET', key(s.scope, 'w'), field, string.format('%.0f|%.9f|%.9f', bucket, ok, fail))
  redis.call('PEXPIRE', key(s.scope, 'w'), 2 * rules.window_ms)
  return calls + ok + fail, failures + fail
end

local function verdict(s, r, quorum)  -- why the circuit opens now, or nil
  local total = r.ok + r.fail
  local weight = total > rules.max_weight and rules.max_weight / total or 1  -- one batch is not everybody's experience
  local calls, failures = window(s, r.ok * weight, r.fail * weight)
  if r.ok > 0 then s.ok_at, s.streak = now, 0 end
  if r.fail > 0 and (r.ok == 0 or r.row == 1) then
    if s.streak == 0 then s.streak_at = now end
    s.streak = s.streak + 1
  end
  if r.fail > 0 or r.hard ~= '' then
    redis.call('HSET', key(s.scope, 'f'), worker, now)
    redis.call('PEXPIRE', key(s.scope, 'f'), KEEP)
    if redis.call('HLEN', key(s.scope, 'f')) > 50 then  -- of workers that are gone
      local all = redis.call('HGETALL', key(s.scope, 'f'))
      for i = 1, #all, 2 do
        if tonumber(all[i + 1]) < now - FAILED_KEPT then redis.call('HDEL', key(s.scope, 'f'), all[i]) end
      end
    end
  end
  if r.hard ~= '' and failing(s, now - rules.window_ms) >= quorum then return r.hard end
  -- Counts are weighted, and no fractions add up exactly.
  if calls >= rules.min_calls - 1e-6 and failures / calls >= rules.rate - 1e-6 and failing(s, now - rules.window_ms) >= quorum then
    return string.format('%.0f %% of %.0f failed', 100 * failures / calls, calls)
  end
  if s.streak >= rules.threshold and failing(s, math.min(s.ok_at, now - 1)) >= quorum then
    return s.streak .. ' failures in a row'
  end
end

local cluster = load(CLUSTER)

local function restore(s, r)  -- what Redis has lost and this worker knows
  s.epoch, s.since = r.epoch, now
  if r.open_ms >= 0 then
    s.trips = r.trips - 1
    change(s, 'open', 'known to a worker, lost by Redis')
    s.till = now + math.min(r.open_ms, rules.max_open_ms)
  end
  if r.forced ~= '' then
    s.forced, s.forced_till = r.forced, r.forced_ms > 0 and now + r.forced_ms or 0
    s.forced_by, s.forced_why = worker, 'known to a worker, lost by Redis'
    log(s, s.state, 'forced ' .. r.forced, s.forced_why, worker)
  end
  if s.scope ~= CLUSTER then redis.call('ZADD', base .. 'topics', now, s.scope) end
end

local function judge(s, r)
  if s.epoch < r.epoch and (r.open_ms >= 0 or r.forced ~= '') then return restore(s, r) end
  if s.state == 'half-open' then lose_probes(s) end
  if s.state ~= 'closed' then
    if r.late == 1 and s.state == 'open' then s.till = math.min(s.till, now) end  -- something arrived: look at once
    -- Silence alone opened it, and that is over; nothing may be left with which to probe it.
    if r.late == 1 and s.silent == 1 then return change(s, 'closed', 'its records arrive') end
    if s.forced == 'closed' and s.till <= now and r.epoch == s.epoch and r.ok > 0 and r.fail == 0 then
      change(s, 'closed', 'records arrive')  -- nobody probes what a person holds open
    end
    return
  end
  if r.epoch ~= s.epoch and s.epoch ~= 0 then return end
  if s.scope == CLUSTER then
    local why = verdict(s, r, alive >= 2 and 2 or 1)
    if why then change(s, 'open', why) end
  else
    local known = redis.call('ZSCORE', base .. 'topics', s.scope)
    local failed = r.fail > 0 or r.hard ~= ''
    if not known and (not failed or redis.call('ZCARD', base .. 'topics') >= TOPICS) then return end
    if failed then redis.call('ZADD', base .. 'topics', now, s.scope) end
    local streak_at = s.streak > 0 and s.streak_at or now
    local why = verdict(s, r, 1)
    -- Where nobody succeeds it is the cluster's, and not this topic's. Who is sure has seen others succeed.
    local others_succeed = cluster.state == 'closed' and cluster.ok_at >= math.min(streak_at, now - 1)
    if why and (others_succeed or r.hard ~= '') then
      change(s, 'open', why)
      s.silent = r.hard ~= '' and 1 or 0
    end
  end
end

local views, seen = {alive}, {}
for place, r in ipairs(cjson.decode(ARGV[4])) do
  local s = place == 1 and cluster or load(r.scope)
  judge(s, r)
  if place == 1 or redis.call('ZSCORE', base .. 'topics', r.scope) then save(s) end
  seen[r.scope] = true
  views[#views + 1] = view(s)
end
for _, scope in ipairs(redis.call('ZRANGE', base .. 'topics', 0, -1)) do
  if not seen[scope] then
    local s = load(scope)
    if s.state == 'half-open' then lose_probes(s) end
    if s.ended or s.changed == 1 then save(s) end
    if shut(s) then redis.call('PEXPIRE', key(scope, 'st'), KEEP) end
    if not shut(s) and s.forced == '' and tonumber(redis.call('ZSCORE', base .. 'topics', scope)) < now - TOPIC_KEPT then
      redis.call('ZREM', base .. 'topics', scope)
    else
      views[#views + 1] = view(s)
    end
  end
end
return views
