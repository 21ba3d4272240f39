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
local LONGEST_LEASE = 3600000  -- of a probe whose length is not known: who asks for the next one says what is too long

worker_looks()
redis.call('ZREMRANGEBYSCORE', base .. 'workers', '-inf', now - 60000)
redis.call('ZREMRANGEBYSCORE', base .. 'workers', now + 60000, '+inf')  -- by another host's clock, before a failover
local alive = redis.call('ZCOUNT', base .. 'workers', now - ALIVE, '+inf')

local function failing(s, since)  -- workers that failed since then
  local count = 0
  for _, at in ipairs(redis.call('HVALS', key(s.scope, 'f'))) do
    if tonumber(at) > since and tonumber(at) <= now then count = count + 1 end
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
        if math.abs(now - all[i + 1]) > FAILED_KEPT then redis.call('HDEL', key(s.scope, 'f'), all[i]) end
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

-- What Redis has lost and this worker knows. Each worker tells the newest that it has seen, and the newest of all holds,
-- whoever tells it first: also that a circuit is closed by now, or automatic again.
local function restore(s, r)
  local why, open = 'known to a worker, lost by Redis', r.open_ms >= 0
  if open or s.state ~= 'closed' then
    change(s, open and 'open' or 'closed', why, r.epoch)
    s.till = open and now + math.min(r.open_ms, rules.max_open_ms) or s.till
  end
  s.epoch, s.since, s.trips, s.ended = r.epoch, now, r.trips, nil
  if s.forced ~= r.forced then
    log(s, s.forced == '' and s.state or 'forced ' .. s.forced, r.forced == '' and 'auto' or 'forced ' .. r.forced, why, worker)
    s.forced, s.forced_by, s.forced_why = r.forced, worker, why
  end
  s.forced_at, s.forced_till = now, r.forced_ms > 0 and now + r.forced_ms or 0
  if s.scope ~= CLUSTER then redis.call('ZADD', base .. 'topics', now, s.scope) end
end

local function says_nothing(r) return r.ok + r.fail + r.late == 0 and r.hard == '' end

local function judge(s, r)
  if s.epoch < r.epoch then restore(s, r) end
  if s.state == 'half-open' then lose_probes(s, LONGEST_LEASE) end
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
    if says_nothing(r) then return end
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
  if place == 1 or not says_nothing(r) or load(r.scope).epoch < r.epoch then
    local s = place == 1 and cluster or load(r.scope)
    judge(s, r)
    if place == 1 or redis.call('ZSCORE', base .. 'topics', r.scope) then save(s) end
    seen[r.scope] = true
    views[#views + 1] = view(s)
  end
end
local topics = redis.call('ZRANGE', base .. 'topics', 0, -1, 'WITHSCORES')
for i = 1, #topics, 2 do
  local scope, at = topics[i], tonumber(topics[i + 1])
  if at > now then redis.call('ZADD', base .. 'topics', now, scope) end
  if not seen[scope] then
    local s = load(scope)
    if s.state == 'half-open' then lose_probes(s, LONGEST_LEASE) end
    if s.ended or s.moved or s.changed == 1 then save(s) end
    if shut(s) then redis.call('PEXPIRE', key(scope, 'st'), KEEP) end
    if not shut(s) and s.forced == '' and at < now - TOPIC_KEPT then
      redis.call('ZREM', base .. 'topics', scope)
    else
      views[#views + 1] = view(s)
    end
  end
end
return views
